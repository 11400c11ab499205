"""Checkpoints, and what is asked of a fold, for every way to fold that must write the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .helpers import llama_plan, llama_tensors, write_checkpoint
from .test_biases import layer_plan, layer_tensors

NAMES = ["compat", "strict", "untie", "twins", "center"]


def make(path: Path, name: str, shards: int = 4) -> tuple[Path, dict[str, Any]]:
    """A new checkpoint at `path`, and the options of `fold_checkpoint` for it."""
    if name == "center":  # with norm biases: E2, E13 and E3
        tensors = layer_tensors(torch.float32)
        return write_checkpoint(path, tensors, shards=shards), {"plan": layer_plan()}
    tied = name == "untie"
    tensors = llama_tensors(3, tied=tied)
    if name == "twins":  # a tied head that is stored all the same
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    untied = name in ("untie", "twins")
    write_checkpoint(path, tensors, shards=shards, tie_word_embeddings=untied)
    (path / "assets").mkdir()
    (path / "assets" / "note.txt").write_text("kept")
    return path, {"plan": llama_plan(3, untied=untied), "strict": name == "strict"}
