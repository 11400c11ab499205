"""Decoding of models whose weights lie otherwise: experts in one tensor, and weights as [in, out].

    python -m benchmarks.layouts olmoe --dtype bf16
    python -m benchmarks.layouts gpt2 --dtype fp32 --seconds 30
    python -m benchmarks.layouts gpt2 --package build/packages

Shapes of the real models with random weights and few layers (`--layers`), so that the weights of a
token are beyond any cache; the vocabulary is small, so that it is the layers that are timed. Eager
and accelerated steps take turns, with the same tokens; medians, and a check against float32 first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn

import flashnorm
from flashnorm.bench.machine import describe, line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 4  # of decoding, between two looks at the clock
CONTEXT = 32
LENGTH = 512  # tokens that a package takes
VOCABULARY = 1024


def config_of(name: str, layers: int | None) -> Any:
    import transformers

    shared = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        return transformers.GPT2Config(n_layer=layers or 12, **shared)
    shared["num_hidden_layers"] = layers or 2
    if name == "olmoe":
        return transformers.OlmoeConfig(intermediate_size=1024, **shared)
    if name == "gpt_oss":
        return transformers.GptOssConfig(num_local_experts=32, **shared)
    return transformers.Qwen3MoeConfig(
        moe_intermediate_size=768, num_attention_heads=32, head_dim=128, **shared
    )


def random_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Every parameter is a stretch of a million random numbers, again and again."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    block = torch.randn(1_000_003) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for first in range(0, flat.numel(), block.numel()):
                part = flat[first : first + block.numel()]
                part.copy_(block[: part.numel()].roll(first % 999_983))
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                fresh = type(module)(config=config)
                module.inv_freq.copy_(fresh.inv_freq)
                module.original_inv_freq = module.inv_freq.clone()
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def decode(model: nn.Module, cache: Any, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Milliseconds of a step, and the last logits."""
    begin = time.perf_counter()
    for token in tokens:
        logits = model(token.view(1, 1), past_key_values=cache, use_cache=True).logits
    taken = (time.perf_counter() - begin) / len(tokens) * 1e3
    cache.crop(-len(tokens))
    return taken, logits


@torch.inference_mode()
def primed(model: nn.Module) -> Any:
    return model(torch.arange(3, 3 + CONTEXT)[None], use_cache=True).past_key_values


def measure(model: nn.Module, seconds: float) -> tuple[list[float], list[float], float]:
    """Milliseconds of eager and of accelerated steps, and how far their logits are apart."""
    made = torch.Generator().manual_seed(1)
    with flashnorm.original(model):
        cache = primed(model)
    times: tuple[list[float], list[float]] = ([], [])
    worst, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 4:
        tokens = torch.randint(3, VOCABULARY, (STEPS,), generator=made)
        with flashnorm.original(model):
            taken, expected = decode(model, cache, tokens)
        times[0].append(taken)
        taken, found = decode(model, cache, tokens)
        times[1].append(taken)
        apart = (found - expected).float().norm() / expected.float().norm()
        worst = max(worst, float(apart))
    return times[0][1:], times[1][1:], worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["olmoe", "qwen3_moe", "gpt_oss", "gpt2"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--package", metavar="DIR", help="decode from a package that is kept there")
    parser.add_argument("--seconds", type=float, default=20)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(line(describe()))
    model = random_model(config_of(given.model, given.layers), DTYPES[given.dtype])
    package = flashnorm.Package(given.package, LENGTH) if given.package else None
    flashnorm.accelerate_(model, package=package)
    eager, ours, apart = measure(model, given.seconds)
    way = "from a package" if package else "accelerated"
    before, now = statistics.median(eager), statistics.median(ours)
    print(
        f"{given.model} {given.dtype}: eager {before:.2f} ms, {way} {now:.2f} ms "
        f"({before / now:.2f}x), {len(ours)} rounds of {STEPS} tokens, {given.threads} threads, "
        f"logits {apart:.1e} apart"
    )


if __name__ == "__main__":
    main()
