"""How far FP8 and INT8 products are from float64: with the norm in the row's scale, and before it.

Before means what is usual: the norm rounded to bfloat16, quantized by rows, multiplied. Both have
the same quantized weight; the truth is the exact norm of x times that weight, so that the rows
alone make the difference. An error is ‖Δ‖ / ‖truth‖ over all rows; the ratio's mean and standard
error are over seeds. No timing, so any machine does.

    python -m benchmarks.scaled_errors --out benchmarks/results/scaled-errors
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashnorm.functional.scaled import (
    FP8,
    INT8,
    QuantizedWeight,
    quantize_weight,
    scaled_norm_linear,
)
from flashnorm.kernels import norms, reference
from flashnorm.kernels.call import Call

ROWS, WIDTH, OUTPUTS, SEEDS, EPS = 256, 512, 256, 20, 1e-5
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "4 channels × 100": lambda x: torch.cat([x[:, :4] * 100, x[:, 4:]], 1),
    "rows of size 1e-3": lambda x: x * 1e-3,
    "mean of 30 deviations": lambda x: x + 30,
}


def errors(x: Tensor, weight: QuantizedWeight, norm: str) -> tuple[float, float]:
    """(norm in the scale, norm before), in what `scaled_norm_linear` returns."""
    exact = reference.normalized(Call(x.double(), (), norm=norms.find(norm), eps=EPS))
    truth = exact @ weight.dequantized().T
    absorbed = scaled_norm_linear(x, weight, norm=norm, eps=EPS)
    z = reference.normalized(Call(x, (), norm=norms.find(norm), eps=EPS))
    before = scaled_norm_linear(z, weight, norm="none")
    return tuple(float((y.double() - truth).norm() / truth.norm()) for y in (absorbed, before))


def measure(kind: str, norm: str, dtype: torch.dtype) -> dict[str, Any]:
    found = []
    for seed in range(SEEDS):
        made = torch.Generator().manual_seed(seed)
        x = KINDS[kind](torch.randn(ROWS, WIDTH, generator=made)).bfloat16()
        weight = torch.randn(OUTPUTS, WIDTH, generator=made).div_(WIDTH**0.5).bfloat16()
        found.append(errors(x, quantize_weight(weight, dtype), norm))
    ratios = [absorbed / before for absorbed, before in found]
    return {
        "rows": kind,
        "norm": norm,
        "dtype": str(dtype).removeprefix("torch."),
        "absorbed": statistics.mean(absorbed for absorbed, _ in found),
        "before": statistics.mean(before for _, before in found),
        "ratio": statistics.mean(ratios),
        "standard_error": statistics.stdev(ratios) / len(ratios) ** 0.5,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{ROWS} rows of {WIDTH}, {OUTPUTS} outputs, {SEEDS} seeds, torch {torch.__version__}.",
        "",
        "| rows | norm | dtype | norm in the scale | norm before, in bf16 | ratio |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['rows']} | {row['norm']} | {row['dtype']} | {row['absorbed']:.5f} "
            f"| {row['before']:.5f} | {row['ratio']:.4f} ± {row['standard_error']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    with torch.no_grad():
        rows = [
            measure(kind, norm, dtype)
            for dtype in (FP8, INT8)
            for norm in ("rms", "layer")
            for kind in KINDS
        ]
    print(table(rows))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
