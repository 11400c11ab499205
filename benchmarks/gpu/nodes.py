"""Kernels of a layer in a decode graph: `python -m benchmarks.gpu.nodes`. It needs no GPU.

A layer is what a model of three layers has more than one of two: norms, products, RoPE, cache and
attention of one token on a static cache, in bf16. A call of ours counts once; it is one launch
where the skinny kernel takes it, of up to three weights. "combined" is with `combo_kernels` of
Inductor, which runs small kernels that do not depend on each other as one.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    StaticCache,
)

import flashnorm
from benchmarks.gpu.lowering import code_for
from flashnorm.kernels import dispatch, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import policy
from flashnorm.kernels.gpu.backend import GpuAttention, GpuBackend
from flashnorm.runtime import inductor

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROOM = 128  # positions of the cache
KERNEL = re.compile(r"(\w+)\.run\(|(extern_kernels\.\w+)\(|= (torch\.ops\.[\w.]+)\(")
OURS, ATTENTION, OTHERS = "norm_linear", "attend", "other kernels"
WAYS = ("original", "without the pass", "with the pass")


class DyT(nn.Module):
    """γ ⊙ tanh(αx) + β (arXiv 2503.10622), in the place of a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.5]))
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.gain + self.bias


class Standing(GpuBackend):
    """The GPU's policy for tensors that are on the CPU until their graph is moved."""

    def claims(self, x: Tensor) -> bool:
        return True

    def available(self, device: torch.device) -> tuple[bool, str]:
        return True, "kernels that stand for those of a GPU"

    def why_not(self, call: Call) -> str | None:
        return None

    def run(self, call: Call) -> list[Tensor]:
        return reference.norm_linear(call)

    def capturing(self) -> bool:
        return False


STANDING = Standing(
    "standing", "cpu", policy.LIMITS, policy.POLICY, policy.COMPILED, GpuAttention(), keeps=False
)


@dataclass(frozen=True)
class Layer:
    """The names of the kernels of one layer, and how often each is called."""

    kernels: Counter[str]

    def count(self, kind: str) -> int:
        return sum(count for name, count in self.kernels.items() if _kind(name) == kind)

    @property
    def total(self) -> int:
        return sum(self.kernels.values())


def _kind(name: str) -> str:
    """Of an operation; what the compiler writes is all of one kind."""
    if not name.startswith("torch.ops.flashnorm"):
        return OTHERS
    return ATTENTION if ATTENTION in name else OURS


def _made(config: PretrainedConfig, layers: int) -> nn.Module:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _with_dyt(config: PretrainedConfig, layers: int) -> nn.Module:
    model = _made(config, layers)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, DyT(config.hidden_size).bfloat16().eval())
    return model


LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "Llama": lambda layers: _made(LLAMA, layers),
    "Qwen3": lambda layers: _made(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=64), layers),
    "GPT-NeoX": lambda layers: _made(GPTNeoXConfig(**SIZES), layers),
    "DyT Llama": lambda layers: _with_dyt(LLAMA, layers),
}


def layer(make: Callable[[int], nn.Module], way: str, **options: Any) -> Layer:
    """One layer of a model, as it is or accelerated, in a graph of torch.compile with options."""
    with torch._inductor.config.patch(**options):
        three, two = (_kernels(make(layers), way) for layers in (3, 2))
    three.subtract(two)
    return Layer(Counter({name: count for name, count in three.items() if count}))


def _kernels(model: nn.Module, way: str) -> Counter[str]:
    if way == WAYS[0]:
        return _called(_decode(model))
    dispatch.register(STANDING)
    try:
        flashnorm.accelerate_(model)
        if way == WAYS[2]:
            return _called(_decode(model))
        with mock.patch.object(inductor, "fuse_"):
            return _called(_decode(model))
    finally:
        dispatch.unregister(STANDING)


def _decode(model: Any) -> str:
    """The code of the step of one token."""
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    tokens = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():  # a cache has its tensors from the first step on
        model(tokens.repeat(1, 3), past_key_values=cache, use_cache=True)
    return code_for(model, tokens, past_key_values=cache, use_cache=True)


def _called(code: str) -> Counter[str]:
    """The kernels that a wrapper launches; what one is fused of has the number of its graph off."""
    names = ("".join(found) for found in KERNEL.findall(code))
    return Counter(re.sub(r"_\d+$", "", name) for name in names)


def main() -> None:
    cases = [(name, way) for name in MODELS for way in WAYS]
    plain = {(name, way): layer(MODELS[name], way) for name, way in cases}
    combined = {(name, way): layer(MODELS[name], way, combo_kernels=True) for name, way in cases}
    kinds = (OURS, ATTENTION, OTHERS)
    header = ("model", "way", "kernels per layer", *kinds, "combined")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for case, found in plain.items():
        counts = (found.total, *map(found.count, kinds), combined[case].total)
        print(f"| {' | '.join(map(str, (*case, *counts)))} |")
    for (name, way), found in plain.items():
        print(f"\n{name}, {way}:")
        for kernel, count in sorted(found.kernels.items()):
            print(f"  {count} {kernel}")


if __name__ == "__main__":
    main()
