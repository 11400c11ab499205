"""Whether weights quantize better once norms are folded into them, and once they are rotated too.

The weights of every linear layer and of the head are quantized, dequantized and put back. The
embedding stays as it is, and the head has a copy of its own in every row. One function in all rows:

    original   W
    folded     W diag(g), by `flashnorm.fold_(model, untie=True)`
    rotated    folded, then W Q for readers, Qᵀ W for writers, E Q: a random Hadamard rotation of
               the residual stream, exact without gains (R1 of SpinQuant 2405.16406)

Weights that were quantized once lie on the grid of that format, which favors them as they are.
Noise takes them off it: a third of a step of Q4_1 (layers) or Q8_0 (embedding) per 32 weights; that
model is then its own full precision. Nothing is timed: any machine does.

    python -m benchmarks.fold_then_quantize demo-output/SmolLM2-135M-Instruct --out PREFIX
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from itertools import product
from math import exp
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import flashnorm
from flashnorm.verification.inputs import TEXT

WINDOW, TOKENS, BLOCK = 128, 2048, 32
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
WRITERS = ("o_proj", "down_proj")


def by_torchao(config: Any, weight: Tensor) -> Tensor:
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, config)
    return layer.weight.dequantize().float()


def by_gguf(kind: gguf.GGMLQuantizationType, weight: Tensor) -> Tensor:
    """As ggml's reference quantizer rounds, which gguf repeats."""
    packed = gguf.quants.quantize(weight.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda weight: weight,
    "int8 rows": partial(by_torchao, Int8WeightOnlyConfig()),
    "int4 by 32": partial(by_torchao, IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    "int4 by 64": partial(by_torchao, IntxWeightOnlyConfig(torch.int4, PerGroup(64))),
    "Q8_0": partial(by_gguf, gguf.GGMLQuantizationType.Q8_0),
    "Q4_0": partial(by_gguf, gguf.GGMLQuantizationType.Q4_0),
    "Q4_1": partial(by_gguf, gguf.GGMLQuantizationType.Q4_1),
}


def hadamard(size: int) -> Tensor:
    """A matrix of ±1 whose rows are orthogonal: [n, n] in float64, for n = 2^a 12^b."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 2:
        raise ValueError(f"no Hadamard matrix is built here for a factor {size}: only 2 and 12")
    if size % 12 == 0:
        return torch.kron(hadamard(size // 12), _paley(11))
    return torch.kron(hadamard(size // 2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double())


def _paley(prime: int) -> Tensor:
    """Paley's first construction, for a prime that is 3 modulo 4: [p + 1, p + 1]."""
    squares = {i * i % prime for i in range(1, prime)}
    signs = torch.tensor([1.0, *(1.0 if i in squares else -1.0 for i in range(1, prime))])
    index = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = signs[(index[None] - index[:, None]) % prime].double()
    matrix[1:, 0] = -1
    return matrix


def rotation(size: int, seed: int) -> Tensor:
    """Q = diag(random signs) H / √n: [n, n] in float64, orthogonal."""
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs * hadamard(size) / size**0.5


@torch.no_grad()
def rotate_(model: Any, seed: int) -> None:
    """W Q for readers, Qᵀ W for writers, E Q; in float64, rounded once."""
    if not all(bool((p == 1).all()) for p in model.parameters() if p.ndim == 1):
        raise ValueError("a norm still has a gain, which no rotation passes: fold it first")
    table = model.get_input_embeddings().weight
    q = rotation(table.shape[1], seed)
    table.copy_(table.double() @ q)
    for name, layer in linears(model):
        wide = layer.weight.double()
        layer.weight.copy_(wide @ q if name.endswith(READERS) else q.T @ wide)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if not name.endswith(READERS + WRITERS):
                raise ValueError(f"{name} is not known to read or write the residual stream")
            yield name, module


@torch.no_grad()
def leave_grid_(model: Any, seed: int) -> None:
    """Normal noise on every matrix: a third of (max − min) / 15 or, for E, of max|W| / 127."""
    noise = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight  # the head's too: still tied
    layers = [layer.weight for _, layer in linears(model) if layer.weight is not table]
    for weight in [table, *layers]:
        blocks = weight.view(-1, BLOCK)
        span = blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)
        step = blocks.abs().amax(1, keepdim=True) / 127 if weight is table else span / 15
        blocks.add_(torch.randn(blocks.shape, generator=noise) * step / 3)


def load(place: str, noise: int | None, rotated: int | None, fold: bool) -> Any:
    """The model in float32 with a head of its own, off the grid by noise, folded, rotated."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    if noise is not None:
        leave_grid_(model, noise)
    if fold:
        flashnorm.fold_(model, untie=True)
    elif model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    if rotated is not None:
        rotate_(model, rotated)
    return model.requires_grad_(False)


@torch.inference_mode()
def logits(model: Any, windows: Tensor) -> Iterator[Tensor]:
    """[T, V] of each window, which starts without context."""
    for window in windows:
        yield model(input_ids=window[None], use_cache=False).logits[0]


def measure(model: Any, windows: Tensor, truth: list[Tensor]) -> dict[str, Any]:
    """By window: the loss, the relative error of the logits and KL from `truth`, in nats."""
    losses, errors, divergences = [], [], []
    for ids, expected, found in zip(windows, truth, logits(model, windows), strict=True):
        loss = nn.functional.cross_entropy(found[:-1], ids[1:], reduction="none")
        losses.append(float(loss.double().mean()))
        errors.append(float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean()))
        log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return {"losses": losses, "errors": errors, "divergences": divergences}


def study(
    place: str, windows: Tensor, noise: int | None, rotations: list[int], formats: list[str]
) -> Iterator[dict[str, Any]]:
    """A row of figures for every way to prepare the weights and every format."""
    truth: list[Tensor] = []
    for row, seed in [("original", None), ("folded", None), *(("rotated", s) for s in rotations)]:
        model = load(place, noise, seed, fold=row != "original")
        truth = truth or list(logits(model, windows))
        weights = {name: layer.weight.clone() for name, layer in linears(model)}
        for kind in formats:
            for name, layer in linears(model):
                layer.weight.copy_(FORMATS[kind](weights[name]))
            found = measure(model, windows, truth)
            yield {"noise": noise, "row": row, "rotation": seed, "format": kind, **found}


def compared(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over windows; `change` of the perplexity from the original's in the same format, in %,
    and `change_error`, two standard errors of it over windows, which both have in common."""
    originals = {(r["noise"], r["format"]): r for r in rows if r["row"] == "original"}
    for row in rows:
        losses = torch.tensor(row["losses"]).double()
        delta = losses - torch.tensor(originals[row["noise"], row["format"]]["losses"]).double()
        ratio = exp(float(delta.mean()))
        yield {
            **row,
            "perplexity": exp(float(losses.mean())),
            "error": sum(row["errors"]) / len(losses),
            "divergence": sum(row["divergences"]) / len(losses),
            "change": 100 * (ratio - 1),
            "change_error": 200 * ratio * float(delta.std() / len(delta) ** 0.5),
        }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| noise | format | weights | perplexity | against the original's | logits' error | KL |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    noises, formats = (dict.fromkeys(row[key] for row in rows) for key in ("noise", "format"))
    by = {pair: i for i, pair in enumerate(product(noises, formats))}
    for row in sorted(compared(rows), key=lambda row: by[row["noise"], row["format"]]):
        noise = "none" if row["noise"] is None else f"seed {row['noise']}"
        turned = "" if row["rotation"] is None else f", seed {row['rotation']}"
        change = f"{row['change']:+.2f} ± {row['change_error']:.2f} %"
        lines.append(
            f"| {noise} | {row['format']} | {row['row']}{turned} | {row['perplexity']:.3f} "
            f"| {'' if row['row'] == 'original' else change} "
            f"| {100 * row['error']:.2f} % | {row['divergence']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a directory of a Llama model with tied embeddings")
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--noises", nargs="*", type=int, default=[0, 1], help="seeds")
    parser.add_argument("--rotations", nargs="*", type=int, default=[0, 1], help="seeds")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--json", action="store_true", help="prints JSON")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md, after every row")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = files("flashnorm.data").joinpath(TEXT).read_text("utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"][: args.tokens])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    about = (
        f"{Path(args.model).name}, {windows.numel()} tokens of {TEXT} by {WINDOW}, "
        f"torch {torch.__version__}, torchao {version('torchao')}, gguf {version('gguf')}."
    )
    rows: list[dict[str, Any]] = []
    for noise in [None, *args.noises]:
        for row in study(args.model, windows, noise, args.rotations, args.formats):
            rows.append(row)
            if args.out:
                held = {"about": about, "rows": list(compared(rows))}
                args.out.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n")
                args.out.with_suffix(".md").write_text(f"{about}\n\n{table(rows)}")
    print(json.dumps(list(compared(rows)), indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
