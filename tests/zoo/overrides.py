"""What no rule can know: one entry per configuration, each with its reason.

Keys are model types; a part of a composite is `type.part`. Values go to the configuration class as
they are. Many entries name layers: there the default has only one kind of layer, or none that runs.
"""

from collections.abc import Callable

from transformers import ResNetConfig, SiglipVisionConfig, TimmBackboneConfig

SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
CONV_THEN_FULL = ["conv", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = {"sliding_attention": ROPE, "full_attention": ROPE}

# One shared attention block must be visited twice; with one visit only there is nothing to tie.
_SHARED_TWICE = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "num_hidden_layers": 4,
}
# Indexer and per-layer n-gram embeddings are off by default, and the attention asks for an indexer.
_QWEN4 = {
    "eos_token_id": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 24,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 8,
}
# The sliding layers want qk_nope_head_dim + qk_rope_head_dim, here 24 + 8.
_DOTS3 = {"head_dim": 32}

_THIN = {"width_coefficient": 0.2, "depth_coefficient": 0.1}

# The timm wrapper of the default needs packages that are not installed; any vision model serves.
_VISION = SiglipVisionConfig(
    hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, image_size=32
)
_VISION.rms_norm_eps, _VISION.vocab_offset, _VISION.vocab_size = 1e-6, 80, 9

OVERRIDES: dict[str, dict] = {
    # no attention layer by default
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    # layers by period: Mamba + MLP, Mamba + MoE, attention + MLP
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2},
    # layers by type, of one kind or of none by default
    "lfm2": {"layer_types": CONV_THEN_FULL},
    "lfm2_moe": {"layer_types": CONV_THEN_FULL},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "cohere_compass_text": {
        "layer_types": SLIDING_THEN_FULL,
        "sliding_window": 4,
        "rope_parameters": ROPES,
    },
    "mellum": {"layer_types": SLIDING_THEN_FULL},
    "laguna": {"layer_types": SLIDING_THEN_FULL},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "zamba": _SHARED_TWICE,
    "zamba2": _SHARED_TWICE,
    "gemma4_assistant.text_config": {
        "layer_types": SLIDING_THEN_FULL,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    },
    "gemma4_unified_assistant.text_config": {
        "layer_types": SLIDING_THEN_FULL,
        "num_kv_shared_layers": 2,
    },
    "llama4_text": {"interleave_moe_layer_step": 2},  # a dense layer, then a sparse one
    "llama4.text_config": {"interleave_moe_layer_step": 2},
    "granitemoeshared": {"shared_intermediate_size": 48},  # no shared expert by default
    "granitemoe_swa": {"shared_intermediate_size": 48},
    # cross-attention layers by index, beyond the tiny number of layers by default
    "mllama.text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    # windows of compressed keys longer than the tiny input
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3}
    },
    # dimensions tied by a check
    "mamba2": {"num_heads": 8},
    "dots3_note_text": _DOTS3,
    "dots3_note.text_config": _DOTS3,
    "xlstm": {"hidden_size": 128},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 48),
        "hash_seed": 0,
    },
    # values that the default configuration lacks
    "dbrx.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "dbrx.ffn_config": {"moe_top_k": 2},  # the weight of a single expert is always 1
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "blt": {"patching_threshold": 4.0},  # else each patch is one byte, and its attention a constant
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp.text_config": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "gemma3n.audio_config": {"vocab_offset": 89, "vocab_size": 9},  # after the vision tokens
    "nemotron": {"num_key_value_heads": 2},
    "moshi.audio_encoder_config": {"codebook_size": 64},  # a power of 2
    # a token for each picture, which the defaults lack
    "blip-2": {"image_token_index": 98},
    "chameleon": {"vocabulary_map": {"<image>": 98}},
    "instructblip": {"image_token_index": 98},
    "instructblipvideo": {"video_token_index": 98},
    # four layers, because four are read
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    # a quarter of a head's channels, in three sections
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    # layers by kind, which the defaults leave open
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "hunyuan_vl_text": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1.0}
        | {"xdrope_section": [2, 2, 2, 2]}
    },
    # widths and depths that are products with a fraction
    "align_vision_model": {**_THIN, "hidden_dim": 640},
    "efficientnet": {**_THIN, "hidden_dim": 256},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64]},
    "glm_ocr_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    "fun_asr_nano.adaptor_config": {"intermediate_size": 16},  # a quarter of the text's width
    "pix2struct_text_model": {"d_kv": 16},  # the heads together as wide as the residual
    # four patches side by side after merging
    "muse_glimmer_vision": {"out_hidden_size": 256},
    "muse_spark_vision": {"out_hidden_size": 256},
    "llama4_vision_model": {"intermediate_size": 256},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},  # of the two layers that are left
    "fast_vlm": {"vision_config": _VISION},
    "clap_audio_model": {"hidden_size": 512},  # eight times the patches'
    # two sections that must be equal
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "blt.global_config": {"hidden_size": 128},  # what the encoder writes, twice its width
}

# Parts that the configuration class would not accept, put in after its checks.
SUBSTITUTES: dict[str, dict] = {"gemma3n": {"vision_config": _VISION}}


def _resnet(default):
    """A backbone for one that needs packages that are not installed, with the same outputs."""
    stages = [i for i in getattr(default, "out_indices", None) or [4] if 0 < i <= 4]
    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[64, 64, 64, 64],
        depths=[1, 1, 1, 1],
        out_features=[f"stage{i}" for i in stages or [4]],
    )


# What stands in for a part of this configuration class.
STAND_INS: dict[type, Callable] = {
    TimmBackboneConfig: _resnet,
}

_ALL_SHARED = (
    "its configuration demands that all layers share keys and values, and then refuses to name the "
    "layers that store them (transformers 5.23)"
)
# Types that nobody can build with the installed transformers, not even from the defaults.
UNBUILDABLE: dict[str, str] = {
    "gemma4_assistant": _ALL_SHARED,
    "gemma4_unified_assistant": _ALL_SHARED,
}
