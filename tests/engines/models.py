"""Small models on disk, with random gains and biases, whose tokenizer any engine reads."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import flashnorm

KINDS = ("plain", "compat", "strict", "untie")
WORDS = 256
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 32}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, **HEADS, query_pre_attn_scalar=32)),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SMALL, **HEADS, **EXPERTS)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, tie_word_embeddings=False)),
}


def write(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of a family, the same every time."""
    cls, config = FAMILIES[family]
    torch.manual_seed(7)
    model = cls(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" in name:
                parameter.mul_(10)  # so that greedy tokens are far apart
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@cache
def checkpoint(root: Path, family: str, kind: str) -> Path:
    """A checkpoint of a family: plain, compat, strict or untie."""
    path = root / f"{family}-{kind}"
    if kind == "plain":
        return write(family, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what strict leaves out
        source = checkpoint(root, family, "plain")
        flashnorm.fold_checkpoint(source, path, strict=kind == "strict", untie=kind == "untie")
    return path
