"""Train a small Llama from scratch, on text that every Python has: three ways, one plot.

- plain: transformers' model as it is.
- fused: the same model after `flashnorm.accelerate_(model, training=True)`. The same losses, less
  memory: between forward and backward no normalized row and no product of gate and up is kept.
- weightless: the same sizes built of `flashnorm.nn`, whose norms have no gain at all: the weights
  behind them learn what gains would.

The text is the language reference in `pydoc_data`, byte by byte. A couple of minutes on two cores:

    python examples/train_tiny_llama.py --steps 300 --out build/tiny-llama

writes build/tiny-llama.json and, where matplotlib is installed, build/tiny-llama.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import flashnorm
from flashnorm.nn import NormGLU, NormLinear, NormLinears

WIDTH, FFN, LAYERS, HEADS, GROUPS, BYTES = 128, 384, 4, 4, 2, 256
BATCH, LENGTH, HELD_OUT = 8, 128, 20_000


def text() -> Tensor:
    """About 700 KB of English and Python, as numbers from 0 to 255."""
    return torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()))


def batches(data: Tensor, steps: int, seed: int = 1) -> Tensor:
    """[steps, BATCH, LENGTH + 1], the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - LENGTH - 1, (steps, BATCH, 1), generator=generator)
    return data[starts + torch.arange(LENGTH + 1)]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            vocab_size=BYTES,
            max_position_embeddings=LENGTH,
            initializer_range=WIDTH**-0.5,
            use_cache=False,
        )
    )


def fused() -> nn.Module:
    return flashnorm.accelerate_(plain(), training=True)


class Layer(nn.Module):
    """One layer of a Llama: each norm is part of the linear layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        head = WIDTH // HEADS
        self.qkv = NormLinears(WIDTH, (WIDTH, GROUPS * head, GROUPS * head))
        self.glu = NormGLU(WIDTH, FFN)
        self.out, self.down = nn.Linear(WIDTH, WIDTH, False), nn.Linear(FFN, WIDTH, False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = [y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for y in self.qkv(x)]
        q, k = (flashnorm.functional.rope(y, cos, sin) for y in heads[:2])
        y = F.scaled_dot_product_attention(q, k, heads[2], is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(self.glu(x))


class Weightless(nn.Module):
    """A Llama without a single gain: all of its parameters are matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(BYTES, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = NormLinear(WIDTH, BYTES)
        half = WIDTH // HEADS // 2
        angles = torch.outer(torch.arange(LENGTH), 10_000 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.head(x)


def weightless() -> nn.Module:
    """Begins with the weights of the plain model, whose gains begin at one."""
    ours, theirs = Weightless(), plain()
    pairs = [(ours.table, theirs.model.embed_tokens), (ours.head, theirs.lm_head)]
    found = [(mine.weight, other.weight) for mine, other in pairs]
    for mine, other in zip(ours.layers, theirs.model.layers, strict=True):
        attention, mlp = other.self_attn, other.mlp
        found += [
            (mine.qkv.weight_0, attention.q_proj.weight),
            (mine.qkv.weight_1, attention.k_proj.weight),
            (mine.qkv.weight_2, attention.v_proj.weight),
            (mine.out.weight, attention.o_proj.weight),
            (mine.glu.gate_weight, mlp.gate_proj.weight),
            (mine.glu.up_weight, mlp.up_proj.weight),
            (mine.down.weight, mlp.down_proj.weight),
        ]
    with torch.no_grad():
        for parameter, value in found:
            parameter.copy_(value)
    return ours


WAYS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "fused": fused,
    "weightless": weightless,
}


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    found = model(rows[:, :-1])
    logits = found if isinstance(found, Tensor) else found.logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def saved_bytes(model: nn.Module, rows: Tensor) -> int:
    """What autograd keeps between forward and backward, without parameters."""
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()), t)[1],
        lambda t: t,
    ):
        loss_of(model, rows)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in held)


def train(name: str, steps: int) -> dict[str, Any]:
    """Losses of every step, the loss on text held out, seconds per step, and bytes kept."""
    data, model = text(), WAYS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1)
    losses, begin = [], time.perf_counter()
    for step, rows in enumerate(batches(data[:-HELD_OUT], steps)):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"{name}: step {step + 1} of {steps}, loss {losses[-1]:.4f}", flush=True)
    took = time.perf_counter() - begin
    with torch.no_grad():
        held_out = float(loss_of(model, batches(data[-HELD_OUT:], 4).flatten(0, 1)))
    kept = saved_bytes(model, batches(data, 1)[0])
    return {
        "losses": losses,
        "held_out": held_out,
        "seconds_per_step": took / steps,
        "saved_bytes": kept,
    }


def plot(found: dict[str, dict[str, Any]], path: Path) -> bool:
    """The loss curves as a picture; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(found.items(), ("-", "--", ":"), strict=False):
        axes.plot(run["losses"], style, label=f"{name} ({run['saved_bytes'] / 1e6:.1f} MB kept)")
    axes.set(xlabel="step", ylabel="loss per byte, nats")
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ways", default=",".join(WAYS), help="of " + ", ".join(WAYS))
    parser.add_argument("--out", type=Path, default=Path("build/tiny-llama"))
    options = parser.parse_args()
    names = options.ways.split(",")
    if unknown := set(names) - set(WAYS):
        parser.error(f"no way to train is called {', '.join(sorted(unknown))}")
    found = {name: train(name, options.steps) for name in names}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    for name, run in found.items():
        print(
            f"{name}: loss {run['losses'][-1]:.4f}, on text held out {run['held_out']:.4f}; "
            f"{run['saved_bytes'] / 1e6:.1f} MB kept, {run['seconds_per_step'] * 1e3:.0f} ms a step"
        )
    if not plot(found, options.out.with_suffix(".png")):
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
