"""What the recipes of docs/recipes.md do to activations and to quantized weights, on a real model.

The functions are those of the page. Rows are one function in float32:

    original   W
    folded     W diag(g), by `flashnorm.fold_(model, untie=True)`
    rotated    folded, then all that writes or reads the stream times Q, Q 1 = 1
    smoothed   folded, then a power of two for each feature from the norms' outputs to their readers

For each: how far the largest number of a norm's output stands out (max|z| / rms(z) of a row, mean
of rows; the worst norm too), the error ‖Δ‖ / ‖z‖ of rounding it to 8 bits by row, symmetrically,
and perplexity and KL of the model. `int8 x` rounds so what every linear layer and the head read.
Nothing is timed: any machine does.

    python -m benchmarks.recipes demo-output/SmolLM2-135M-Instruct --out PREFIX
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup

import flashnorm
from benchmarks.fold_then_quantize import WINDOW, by_torchao, logits, measure
from flashnorm.verification.inputs import TEXT

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
int4 = partial(by_torchao, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
# What happens to weights, and whether what they multiply is rounded.
FORMATS: dict[str, tuple[Callable[[Tensor], Tensor] | None, bool]] = {
    "float32": (None, False),
    "int8 x": (None, True),
    "int4 by 32": (int4, False),
    "int4 by 32, int8 x": (int4, True),
}


def recipes() -> dict[str, Any]:
    """The functions of the page."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    names: dict[str, Any] = {"flashnorm": flashnorm, "torch": torch, "nn": nn, "copy": copy}
    for text in blocks:
        if "def " in text:
            exec(compile(text, PAGE.name, "exec"), names)
    return names


def rows(original: Any, calibration: Tensor, seeds: list[int]) -> Iterator[tuple[str, Any]]:
    page, plan = recipes(), flashnorm.inspect(original, untie=True)
    writers = page["stream_of"](original, plan)
    yield "original", original
    folded = flashnorm.fold_(copy.deepcopy(original), untie=True)
    yield "folded", folded
    for seed in seeds:
        rotated = copy.deepcopy(folded)
        q = page["rotation"](rotated.get_input_embeddings().weight.shape[1], seed)
        page["rotate_"](rotated, plan, writers, q)
        yield f"rotated, seed {seed}", rotated
    smoothed = copy.deepcopy(folded)
    page["smooth_"](smoothed, plan, calibration)
    yield "smoothed", smoothed


def rounded(x: Tensor) -> Tensor:
    """Eight bits by row, symmetrically: x ≈ s·round(x / s), s = max|x| / 127."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


@contextmanager
def quantized(model: Any, weights: Callable[[Tensor], Tensor] | None, x: bool) -> Iterator[Any]:
    """A copy whose linear layers are dequantized ones, and are given rounded x."""
    twin = copy.deepcopy(model)
    if twin.lm_head.weight is twin.get_input_embeddings().weight:
        twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
    for layer in (m for m in twin.modules() if isinstance(m, nn.Linear)):
        if weights is not None:
            layer.weight = nn.Parameter(weights(layer.weight.detach()), requires_grad=False)
        if x:
            layer.register_forward_pre_hook(lambda _, given: (rounded(given[0]),))
    yield twin


def outliers(model: Any, plan: Any, ids: Tensor) -> dict[str, float]:
    """max|z| / rms(z) of a norm's output, mean of its rows: the mean over norms, and the worst."""
    outputs = recipes()["outputs_of"](model, plan, ids).values()
    peaks = [float((z.abs().amax(-1) / z.square().mean(-1).sqrt()).mean()) for z in outputs]
    errors = [float(((rounded(z) - z).norm(dim=-1) / z.norm(dim=-1)).mean()) for z in outputs]
    return {
        "peak": sum(peaks) / len(peaks),
        "worst": max(peaks),
        "rounding": sum(errors) / len(errors),
    }


def study(original: Any, ids: Tensor, windows: Tensor, seeds: list[int]) -> Iterator[Any]:
    plan, truth = flashnorm.inspect(original, untie=True), list(logits(original, windows))
    for name, model in rows(original, ids, seeds):
        found = outliers(model, plan, windows[:4])
        for kind, (weights, x) in FORMATS.items():
            with quantized(model, weights, x) as twin:
                made = measure(twin, windows, truth)
            means = {key: sum(values) / len(values) for key, values in made.items()}
            yield {"row": name, "format": kind, **found, **means}


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| weights | format | max / rms, mean of norms | worst norm | z in 8 bits, error "
        "| perplexity | KL |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        lines.append(
            f"| {row['row']} | {row['format']} | {row['peak']:.1f} | {row['worst']:.1f} "
            f"| {100 * row['rounding']:.2f} % | {exp(row['losses']):.2f} "
            f"| {row['divergences']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a directory of a model that the recipes take")
    parser.add_argument("--rotations", nargs="*", type=int, default=[0, 1], help="seeds")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md, after every row")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = files("flashnorm.data").joinpath(TEXT).read_text("utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text)["input_ids"])
    windows = ids[: args.tokens // WINDOW * WINDOW].view(-1, WINDOW)
    calibration = ids[args.tokens : args.tokens + 4 * WINDOW].view(-1, WINDOW)  # other text
    about = (
        f"{Path(args.model).name}, {windows.numel()} tokens of {TEXT} by {WINDOW}, "
        f"torch {torch.__version__}, torchao {version('torchao')}."
    )
    found: list[dict[str, Any]] = []
    for row in study(model.requires_grad_(False), calibration, windows, args.rotations):
        found.append(row)
        if args.out:
            held = {"about": about, "rows": found}
            args.out.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(f"{about}\n\n{table(found)}")
    print(table(found))


if __name__ == "__main__":
    main()
