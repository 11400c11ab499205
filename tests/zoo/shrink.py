"""Shrink any configuration class by the meaning of its field names.

A rule maps a field name to a tiny value. Lists that describe one layer each are cut down to the first layer of every
kind, so that each kind of layer stays. Sub-configurations are shrunk the same way. `OVERRIDES` holds the few values
that a rule cannot know.
"""

import copy
import dataclasses
import re

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from tests.zoo.overrides import OVERRIDES

VOCAB = 99
HIDDEN = 64
HEADS = 4
LAYERS = 2


def _keep(value, base):
    return value


def _to(tiny):
    """A constant, but never more than the default."""
    return lambda value, base: min(value, tiny)


def _width(value, base):
    """A width beside the residual: twice or half the residual if it is so by default, else the residual itself."""
    hidden = base.get("hidden_size") or base.get("d_model") or value
    return HIDDEN * 2 if value == 2 * hidden else HIDDEN


def _kv_heads(value, base):
    heads = base.get("num_attention_heads") or base.get("n_heads") or base.get("num_heads") or value
    return HEADS if value >= heads else min(value, HEADS // 2)


def _key_heads(value, base):
    return HEADS if value == base.get("linear_num_value_heads", value) else HEADS // 2


# (pattern of the whole field name, rule); the first match wins, and a field without a match keeps its default.
RULES = [
    (
        r"chunk_size_(feed_forward|lm_head)|num_logits_to_keep|pretraining_tp|num_channels|in_channels",
        _keep,
    ),
    (
        r"max_window_layers|num_residual_layers|num_nextn_predict_layers|num_mtp_layers|spatial_merge_size",
        _to(1),
    ),
    (r".*vocab(_size.*)?|.*_vocab|num_centroids|codebook_size|num_codebooks", _to(VOCAB)),
    (r"n_layers?|num_(hidden|global|encoder|decoder)?_?layers|(en|de)coder_layers", _to(LAYERS)),
    (
        r"depth|num_blocks|conf_num_hidden_layers|num_layers_per_stack|n_layers_per_attn_res_block",
        _to(LAYERS),
    ),
    (r"num_kv_shared_layers", _to(LAYERS)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", _to(1)),
    (r"(.*_)?(n|num)_(key_value|kv)_heads|kv_n_heads", _kv_heads),
    (r"linear_num_key_heads", _key_heads),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", _to(8)),
    (
        r".*(n|num)_heads?|.*(attention|indexer)_heads|num_query_groups|.*_n_heads|n_head",
        _to(HEADS),
    ),
    (r"mamba_d_ssm", _to(2 * HIDDEN)),
    (r"n_groups?|num_expert_group|mamba_n_?groups|o_groups", _to(2)),
    (r"topk_group", _to(1)),
    (r"index_topk.*|indexer_budget|centroid_intermediate_top_k", _to(4)),
    (r"(n_routed|num|num_local|moe_num)_experts|zero_expert_num", _to(4)),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", _to(2)),
    (r".*shared_experts", _to(2)),
    (r".*(d_state|state_size)|laurel_rank|hc_lowrank", _to(8)),
    (r".*dt_rank|time_step_rank|hc_sinkhorn_iters|d_rel", _to(4)),
    (r"q_lora_rank|o_lora_rank", _to(24)),
    (r".*rank", _to(20)),
    (r"qk_head_dim", _to(24)),
    (r"qk_rope_head_dim|rotary_dim", _to(8)),
    (r"v_head_dim", _to(12)),
    (
        r".*head_?dim|dim_head|d_head|mamba_d_head|attention_head_size|kv_channels|query_pre_attn_scalar",
        _to(16),
    ),
    (
        r"word_embed_proj_dim|.*embedding_size|.*_embed_dim|d_inner|mlp_dim|hidden_size_per_layer_input",
        _to(48),
    ),
    (
        r".*intermediate_size(_mlp)?|.*ffn_(hidden_size|dim)|.*hidden_size_mlp|dff|dim_ff|feed_forward_size",
        _to(80),
    ),
    (
        r".*hidden_size.*|d_model|n_embd|emb_dim|embedding_dim|embed_dim|lru_width|dim|projector_.*put_dim",
        _width,
    ),
    (
        r"adapter_(in|out)_dim|adapter_input_size|vision_output_dim|input_size|dim_model_base",
        _width,
    ),
    (
        r".*sliding_window(_size)?|.*attention_chunk_size|window_size|local_attention.*|.*_window_size",
        _to(4),
    ),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*context_length|max_.*_positions",
        _to(64),
    ),
    (r"image_size|crop_size", _to(32)),
    (r"patch_size", _to(16)),
]


def shrink_value(name: str, value: int, base: dict) -> int:
    """The tiny value of an integer field; `base` holds the default values of all fields of the same class."""
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return rule(value, base)
    return value


def tiny_config(model_type: str) -> PretrainedConfig:
    """The tiny configuration that the causal-LM class of `model_type` takes.

    Where that class takes a part of the registered configuration (a text decoder inside a larger model), the part.
    """
    config = shrink(CONFIG_MAPPING[model_type], model_type)
    wanted = causal_lm_class(model_type).config_class
    if isinstance(config, wanted):
        return config
    for name in type(config).sub_configs:
        if isinstance(getattr(config, name), wanted):
            return getattr(config, name)
    return config


def causal_lm_class(model_type: str) -> type:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return getattr(transformers, NAMES[model_type])


def shrink(cls: type, path: str) -> PretrainedConfig:
    """A tiny instance of the configuration class `cls`; `path` is its model type and the way into its parts."""
    overrides = OVERRIDES.get(path, {}) | {}
    base, own = _defaults(cls)
    kwargs = {k: shrink_value(k, v, base) for k, v in own.items() if _is_int(v)}
    kwargs |= _per_layer(cls, base, own)
    kwargs |= {k: v for k, v in overrides.items()}
    _small_token_ids(kwargs, base)
    for name, spec in cls.sub_configs_defaults.items():
        if name not in overrides and (part := _part_class(spec, base.get(name))):
            kwargs[name] = shrink(part, f"{path}.{name}")
    return cls(**kwargs)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _defaults(cls: type) -> tuple[dict, dict]:
    """Values of the default instance (`base`), and of those the ones that the class itself sets (`own`)."""
    own = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    own = {k: v for k, v in own.items() if v is not dataclasses.MISSING}
    try:
        base = own | vars(cls()) | {"per_layer_config": cls().to_dict().get("per_layer_config")}
    except Exception:  # the default instance of a composite may not pass its own checks
        base = own
    return base, own


def _part_class(spec, default):
    if isinstance(default, PretrainedConfig):
        return type(default)
    if spec.optional:
        return None
    if issubclass(spec.config_class, PretrainedConfig):
        return spec.config_class
    return spec.get_config_class(spec.model_type)


def _per_layer(cls: type, base: dict, own: dict) -> dict:
    """Cut lists with one entry per layer to the first layer of each kind, and at least `LAYERS` layers."""
    count_name = next((n for n in ("num_hidden_layers", "num_layers", "n_layer") if n in own), None)
    if count_name is None or not _is_int(count := base.get(count_name)):
        return {}
    lists = {
        k: v
        for k, v in base.items()
        if k in own and isinstance(v, (list, tuple)) and len(v) == count
    }
    extra = {int(k): v for k, v in (base.get("per_layer_config") or {}).items()}
    if not lists and not extra:
        return {}
    kinds = [
        (*(str(v[i]) for v in lists.values()), *sorted(extra.get(i, {}))) for i in range(count)
    ]
    chosen = sorted({kinds.index(kind) for kind in kinds})
    while len(chosen) < LAYERS:
        chosen.append(chosen[-1])
    tiny = {k: [_shrink_entry(k, v[i], base) for i in chosen] for k, v in lists.items()}
    tiny[count_name] = len(chosen)
    if extra:
        tiny["per_layer_config"] = {
            j: {k: _ratio(k, v, base) for k, v in extra[i].items()}
            for j, i in enumerate(chosen)
            if i in extra
        }
    return tiny


def _shrink_entry(name, value, base):
    singular = name.removesuffix("_per_layer")
    return shrink_value(singular, value, base) if _is_int(value) and value > 1 else copy.copy(value)


def _ratio(name, value, base):
    """The tiny value of a per-layer override: in the same ratio to the tiny global value as by default."""
    usual = base.get(name)
    if not (_is_int(value) and _is_int(usual)):
        return shrink_value(name, value, base) if _is_int(value) else value
    return max(2, shrink_value(name, usual, base) * value // usual)


def _small_token_ids(kwargs: dict, base: dict) -> None:
    """Move each special token beyond the tiny vocabulary to a place of its own at the vocabulary's end."""
    free = VOCAB - 1
    for name, value in base.items():
        if not re.fullmatch(r".*_token_(id|index)", name) or name in OVERRIDES:
            continue
        if _is_int(value) and value >= VOCAB - 20:
            kwargs[name] = free
            free -= 1
        elif isinstance(value, (list, tuple)):
            kwargs[name] = [free]
            free -= 1
