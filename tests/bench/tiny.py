"""The smallest model that is worth benchmarking, as a config alone."""

from __future__ import annotations

import json
from pathlib import Path

import flashnorm

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def config(folder: Path, **changes: object) -> Path:
    """A config.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIG | changes))
    return file


def accelerates() -> bool:
    """Whether this flashnorm has kernels for whole models yet."""
    try:
        return callable(flashnorm.accelerate_)
    except (AttributeError, ImportError):
        return False
