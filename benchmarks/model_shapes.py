"""Models that are measured with random weights: only their shapes matter for speed and memory."""

from __future__ import annotations

from typing import Any

LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
MISTRAL_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def configuration(architecture: str, kind: str, layers: int, shape: dict[str, Any]) -> dict:
    """What a config.json of `layers` layers of this shape holds."""
    return {
        "model_type": kind,
        "architectures": [architecture],
        "num_hidden_layers": layers,
        **shape,
    }


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": configuration("LlamaForCausalLM", "llama", 16, LLAMA_1B),
    "mistral-7b": configuration("MistralForCausalLM", "mistral", 32, MISTRAL_7B),
    "tiny": configuration("LlamaForCausalLM", "llama", 2, TINY),
}
