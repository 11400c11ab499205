"""What a field's name says of its tiny value: one list of rules for all configurations."""

VOCAB = 99
HIDDEN = 64
HEADS = 4
LAYERS = 2
# Fields that some classes leave empty although their model needs a number.
MISSING = {"head_dim": 16, "num_experts_per_tok": 2}
Rules = list[tuple]
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def _keep(value, base):
    return value


def _to(tiny):
    """A constant, but never more than the default."""
    return lambda value, base: min(value, tiny)


def _width(value, base):
    """Twice as wide as the residual if it is so by default, else as wide as the residual."""
    hidden = base.get("hidden_size") or base.get("d_model") or value
    return HIDDEN * 2 if value == 2 * hidden else HIDDEN


def _kv_heads(value, base):
    heads = base.get("num_attention_heads") or base.get("n_heads") or base.get("num_heads") or value
    return HEADS if value >= heads else min(value, HEADS // 2)


def _head_dim(value, base):
    """16, or 24 where the heads together are not as wide as the residual by default.

    As wide as the rotated part of a latent-attention head if it is so by default.
    """
    if "qk_rope_head_dim" in base:
        return 8 if value == base["qk_rope_head_dim"] else min(value, 16)
    heads, hidden = base.get("num_attention_heads"), base.get("hidden_size")
    return 24 if heads and hidden and value * heads != hidden else min(value, 16)


def _key_heads(value, base):
    return HEADS if value == base.get("linear_num_value_heads", value) else HEADS // 2


# (rule, patterns of whole field names): the first match wins, without one the default stays.
RULES = [
    (_keep, r"chunk_size_\w+", r"num_logits_to_keep", r"pretraining_tp", r"(num|in)_channels"),
    (_to(1), r"max_window_layers", r"num_residual_layers", r"num_nextn_\w+", r"num_mtp_layers"),
    (
        _to(1),
        r"first_k_dense_replace",
        r"num_dense_layers",
        r"moe_layer_start_index",
        r"topk_group",
    ),
    (_to(1), r"spatial_merge_size", r"adapter_merge_size", r"indexer_kv_heads"),
    (_to(VOCAB), r".*vocab(_size.*)?", r"num_centroids"),
    (_to(64), r".*codebook_size", r"num_codevectors_per_group"),
    (_to(LAYERS), r"n_layers?", r"num_((hidden|global|encoder|decoder)_)?layers", r"depth"),
    (_to(LAYERS), r"(en|de)coder_layers", r"num_blocks", r".*num_hidden_layers"),
    (_to(LAYERS), r"num_layers_per_stack", r"n_layers_per_attn_res_block", r"num_kv_shared_layers"),
    (_kv_heads, r".*(n|num)_(key_value|kv)_heads", r"kv_n_heads"),
    (_key_heads, r"linear_num_key_heads"),
    (_to(8), r"mamba_n_heads", r"mamba_num_heads", r"n_mamba_heads"),
    (_to(HEADS), r".*(n|num)_heads?", r".*attention_heads", r"num_query_groups", r"n_head"),
    (_to(2 * HIDDEN), r"mamba_d_ssm"),
    (
        _to(2),
        r"n_groups?",
        r"num_expert_group",
        r"mamba_n_?groups",
        r"o_groups",
        r".*shared_experts",
    ),
    (
        _to(2),
        r"num_experts_per_tok(en)?",
        r"moe_top_?k",
        r"moe_k",
        r"top_k_experts",
        r"index_(block|topk)\w*",
    ),
    (_to(4), r"(n_routed|num|num_local|moe_num)_experts", r"zero_expert_num"),
    (
        _to(4),
        r"indexer_budget",
        r"centroid_intermediate_top_k",
        r"\w+chunk_length",
    ),
    (_to(4), r".*dt_rank", r"time_step_rank", r"hc_sinkhorn_iters", r"d_rel"),
    (_to(4), r".*sliding_window(_size)?", r"attention_chunk_size", r".*window_(size|len)"),
    (_to(4), r"local_attention"),
    (
        _to(8),
        r".*(d_state|state_size)",
        r"laurel_rank",
        r"hc_lowrank",
        r"qk_rope_head_dim",
        r"rotary_dim",
    ),
    (_to(12), r"v_head_dim"),
    (_head_dim, r"head_dim"),
    (_to(24), r"q_lora_rank", r"o_lora_rank", r"qk_head_dim"),
    (_to(20), r".*rank"),
    (_to(16), r".*head_?dim", r"dim_head", r".*d_head", r"attention_head_size", r"kv_channels"),
    (_to(16), r"query_pre_attn_scalar", r"patch_size"),
    (_to(32), r"image_size", r"crop_size"),
    (_to(48), r"word_embed_proj_dim", r".*embedding_size", r".*_embed_dim", r"d_inner"),
    (_to(48), r"hidden_size_per_layer_input"),
    (_to(80), r".*intermediate_size(_mlp)?", r".*ffn_(hidden_size|dim)", r"dff", r"dim_ff"),
    (_to(80), r"feed_forward_size", r"mlp_dim"),
    (
        _width,
        r".*hidden_size.*",
        r"d_model",
        r"n_embd",
        r"emb(ed)?(ding)?_dim",
        r"lru_width",
        r"dim",
    ),
    (_width, r"projector_(in|out)put_dim", r"adapter_(in|out)_dim", r"adapter_input_size"),
    (_width, r"vision_output_dim", r"input_size", r"dim_model_base"),
    (
        _to(64),
        r"max_position_embeddings",
        r"n_positions",
        r"n_ctx",
        r"max_seq_len",
        r"context_length",
    ),
    (_to(64), r"max_\w+_positions"),
]


def _stage_heads(value, base):
    """A power of two, so that it divides every width."""
    return 1 << min(value, HEADS).bit_length() - 1


# Fields that further classes leave empty although their model needs a number.
FURTHER_MISSING = {
    **MISSING,
    "prediction_length": 8,
    "vocab_size": VOCAB,
    "pad_token_id": 1,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}


def _window(value, base):
    """Two patches after merging where a window is given in pixels, else four positions."""
    if "spatial_merge_size" in base and value > 4 * base.get("patch_size", value):
        return 2 * min(base["patch_size"], 16)
    return min(value, 4)


# More that the further classes name: channels, groups and positions.
FURTHER = [
    (lambda value, base: value if value < 8 else HIDDEN, r"input_size"),
    (_keep, r"patch_embed_hidden_size"),
    (_to(8), r"num_queries"),
    (_to(HIDDEN), r"d_latents", r"hidden_dim"),
    (_to(2), r"num_self_attends_per_block"),
    (_to(32), r"base_channels"),
    (_to(HIDDEN), r"output_channels", r"downsample_channel"),
    (_to(HIDDEN), r"upsample_groups", r"max_pos_emb", r"context_size"),
    (_to(2), r"index_kpool"),
    (_window, r"window_size"),
    (_to(4), r"num_windows"),
    *RULES,
]
# Lists of numbers, one per stage.
STAGES = [(_stage_heads, r".*(n|num)_heads?", r".*attention_head"), *FURTHER]
# The rules that leave every width as it is.
DEPTHS = [
    (_to(LAYERS), r"n_layers?", r"num_((hidden|global|encoder|decoder)_)?layers", r"depth"),
    (_to(LAYERS), r"(en|de)coder_layers", r"num_blocks", r".*num_hidden_layers"),
    (_to(VOCAB), r".*vocab(_size.*)?"),
]
