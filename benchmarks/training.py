"""What one training step of a Llama layer keeps for its gradient, and how much memory a step takes.

Saved bytes are counted with `torch.autograd.graph.saved_tensors_hooks`: each storage once, without
parameters, per layer (a model of three layers less one of two) and token, in units of one row of
the residual stream (n numbers in bf16). The variants:

- eager: the model as transformers runs it.
- rms_norm: its norms are `F.rms_norm` as the fused kernel saves it, x and one number per row. (On a
  CPU torch takes it apart and saves more: row "rms_norm, composite".)
- liger: norms as above and a GLU that saves gate and up only, as Liger's kernels do; the next
  linear layer saves the product.
- dividing: norms that save their result, which the linear layers behind save anyhow, and divide the
  gain out of it again; with the eager GLU, and with liger's.
- flashnorm: `accelerate_(model, training=True)`.

The peak is the most that torch's allocator had given out during forward and backward of a model
of several layers, beyond what was there before; it includes the gradients of the parameters.

    python -m benchmarks.training --out benchmarks/results/training-memory
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import flashnorm
from flashnorm.bench import machine
from flashnorm.bench.memory import peak_allocated

DTYPE = torch.bfloat16
# Llama-3.2-1B has 2048, 8192, 32 and 8: the same proportions.
WIDTH, FFN, HEADS, GROUPS = 256, 1024, 8, 2
BATCH, TOKENS, PEAK_TOKENS, PEAK_LAYERS = 2, 64, 512, 6


class FusedRMSNorm(Function):
    """Saves x and one number per row, as torch's fused kernel and Liger's do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, gain)
        return (wide * scale).to(x.dtype) * gain

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, gain = ctx.saved_tensors
        return *_norm_gradients(d, x.float() * scale, scale, gain), None


class DividingRMSNorm(Function):
    """Saves its result and one number per row, and divides by the gain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        z = (wide * scale).to(x.dtype) * gain
        ctx.save_for_backward(z, scale, gain)
        return z

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        z, scale, gain = ctx.saved_tensors
        return *_norm_gradients(d, z.float() / gain.float(), scale, gain), None


def _norm_gradients(d: Tensor, hat: Tensor, scale: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    wide = d.float() * gain.float()
    dx = scale * (wide - hat * (wide * hat).mean(-1, keepdim=True))
    return dx.to(d.dtype), (d.float() * hat).flatten(0, -2).sum(0).to(gain.dtype)


class FusedSwiGLU(Function):
    """Saves gate and up, as Liger's does."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d * b, a), d * F.silu(a)


def with_norms(model: nn.Module, norm: Callable[[Tensor, Tensor, float], Tensor]) -> nn.Module:
    """The model with another function for its RMSNorms."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return model


def with_fused_glu(model: nn.Module) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(FusedSwiGLU.apply(self.gate_proj(x), self.up_proj(x)))

    for module in model.modules():
        if type(module).__name__.endswith("MLP"):
            module.forward = MethodType(forward, module)
    return model


def composite(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, eps)


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "rms_norm, composite": lambda model: with_norms(model, composite),
    "rms_norm": lambda model: with_norms(model, FusedRMSNorm.apply),
    "dividing": lambda model: with_norms(model, DividingRMSNorm.apply),
    "liger": lambda model: with_fused_glu(with_norms(model, FusedRMSNorm.apply)),
    "dividing, liger's GLU": lambda model: with_fused_glu(with_norms(model, DividingRMSNorm.apply)),
    "flashnorm": lambda model: flashnorm.accelerate_(model, training=True, huge_pages=False),
}


def llama(layers: int) -> nn.Module:
    """A Llama in training mode, with random gains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        num_hidden_layers=layers,
        vocab_size=512,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(DTYPE).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    return model


def loss(model: nn.Module, length: int = TOKENS) -> Tensor:
    ids = torch.randint(0, 512, (BATCH, length), generator=torch.Generator().manual_seed(1))
    return model(ids, labels=ids).loss


def saved_bytes(model: nn.Module) -> int:
    """Bytes that autograd keeps for one step: every storage once, without parameters."""
    loss(model)  # the first call of an accelerated model compares it with its own forwards
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no storage takes the place of another one that was counted

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model)
    return sum(kept.values())


def per_layer(variant: str) -> float:
    """Rows of n bf16 numbers that one layer keeps for every token."""
    more, less = (saved_bytes(VARIANTS[variant](llama(layers))) for layers in (3, 2))
    return (more - less) / (BATCH * TOKENS * WIDTH * DTYPE.itemsize)


def peak(variant: str) -> int:
    """Bytes of one step at its peak."""
    model = VARIANTS[variant](llama(PEAK_LAYERS))

    def step() -> None:
        with torch.enable_grad():
            loss(model, PEAK_TOKENS).backward()
        model.zero_grad(set_to_none=True)

    step()
    return peak_allocated(step)


def error(variant: str) -> float:
    """Largest distance of a gradient from the eager model's in float32, relative to its norm."""
    exact, model = llama(2).float(), VARIANTS[variant](llama(2))
    exact.load_state_dict(copy.deepcopy(model.state_dict()))
    for each in (exact, model):
        loss(each).backward()
    pairs = zip(exact.parameters(), model.parameters(), strict=True)
    return max(float((b.grad.float() - a.grad).norm() / a.grad.norm()) for a, b in pairs)


def measure() -> dict[str, Any]:
    rows = [
        {
            "variant": name,
            "saved_rows_per_layer_and_token": per_layer(name),
            "peak_bytes": peak(name),
            "gradient_error": error(name),
        }
        for name in VARIANTS
    ]
    shape = {"width": WIDTH, "ffn": FFN, "heads": HEADS, "groups": GROUPS, "dtype": "bf16"}
    shape |= {"batch": BATCH, "tokens": TOKENS, "peak_tokens": PEAK_TOKENS}
    shape |= {"peak_layers": PEAK_LAYERS}
    return {"machine": machine.line(machine.describe()), "shape": shape, "rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """A table beside eager and the strongest other variant of the issue, F.rms_norm."""
    by_name = {row["variant"]: row for row in found["rows"]}
    base = by_name["rms_norm"]
    lines = [
        "| | saved per layer and token, n numbers | against rms_norm | peak of a step, MB "
        "| against rms_norm | gradient error in bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        saved, peak_bytes = row["saved_rows_per_layer_and_token"], row["peak_bytes"]
        less = saved / base["saved_rows_per_layer_and_token"] - 1
        lower = peak_bytes / base["peak_bytes"] - 1
        lines.append(
            f"| {row['variant']} | {saved:.3f} | {less:+.1%} | {peak_bytes / 1e6:.1f} "
            f"| {lower:+.1%} | {row['gradient_error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    found = measure()
    print(json.dumps(found, indent=2) if options.json else markdown(found))
    if options.out:
        shape = ", ".join(f"{name} {value}" for name, value in found["shape"].items())
        title = f"Machine: {found['machine']}. Shape: {shape}.\n\n"
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(title + markdown(found) + "\n")


if __name__ == "__main__":
    main()
