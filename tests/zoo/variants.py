"""Options, off by default, that move a norm: what a fold must get right beyond the defaults."""

from .overrides import ROPE, SLIDING_THEN_FULL

# name: (model type, changed fields). Each name says what is different.
VARIANTS: dict[str, tuple[str, dict]] = {
    "bloom-residual-after-norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt-no-affine": ("opt", {"layer_norm_elementwise_affine": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "stablelm-qk-norm": ("stablelm", {"qk_layernorm": True}),
    "phi-qk-norm": ("phi", {"qk_layernorm": True}),
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True}),
    "glm4_moe-qk-norm": ("glm4_moe", {"use_qk_norm": True}),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "bias": True}),
    "falcon-two-norms": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "gpt_bigcode-multi-head": ("gpt_bigcode", {"multi_query": False}),
    "gpt2-cross-attention": ("gpt2", {"add_cross_attention": True}),
    "bert-cross-attention": ("bert", {"add_cross_attention": True}),
    "gemma4_text-moe": (
        "gemma4_text",
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "falcon_h1-gated-norm": ("falcon_h1", {"mamba_rms_norm": True}),
    "falcon_h1-multipliers": (
        "falcon_h1",
        {
            "embedding_multiplier": 1.5,
            "attention_in_multiplier": 0.7,
            "ssm_in_multiplier": 1.3,
            "ssm_multipliers": [0.5, 0.7, 1.2, 1.4, 0.9],
            "mlp_multipliers": [0.6, 1.4],
        },
    ),
    "granite-multipliers": (
        "granite",
        {"embedding_multiplier": 1.5, "residual_multiplier": 0.6, "logits_scaling": 2.0},
    ),
    "granitemoehybrid-dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "hyperclovax-pre-norm": ("hyperclovax", {"use_post_norm": False}),
    "modernbert-decoder-norm-bias": ("modernbert-decoder", {"norm_bias": True}),
    "xmod-pre-norm": ("xmod", {"pre_norm": True}),
    "xmod-adapter-norm": (
        "xmod",
        {"adapter_layer_norm": True, "adapter_reuse_layer_norm": False},
    ),
    "zamba2-adapters": ("zamba2", {"use_shared_attention_adapter": True}),
    "doge-moe": ("doge", {"is_moe": True}),
    "lfm3-no-sandwich": ("lfm3", {"use_sandwich_norm": False}),
    "lfm3-no-gate": ("lfm3", {"use_attention_gate": False}),
    "llama4_text-no-qk-norm": ("llama4_text", {"use_qk_norm": False}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    "qwen2-sliding": (
        "qwen2",
        {
            "layer_types": SLIDING_THEN_FULL,
            "use_sliding_window": True,
            "sliding_window": 4,
            "rope_parameters": ROPE,
        },
    ),
    "deepseek_v3-no-q-lora": ("deepseek_v3", {"q_lora_rank": None}),
}
