"""FP8 and INT8 products with the norm in the scale of the row, and with the norm before them.

All sides quantize in kernels that torch.compile makes, and multiply by the library; what differs is
where the norm is: nowhere, in the kernel that quantizes (as engines have it), or in one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.environment import l2_bytes
from benchmarks.gpu.operations import DRY_ROWS, EPS, LEAST_COPIES, PAPER, SECONDS
from benchmarks.gpu.records import Piece, Row, Run, Shape
from benchmarks.gpu.timing import in_turn, per_call
from flashnorm.bench.timing import in_words
from flashnorm.bench.variants import many_compilations
from flashnorm.functional.scaled import (
    FP8,
    INT8,
    QuantizedWeight,
    quantize_rows,
    quantize_weight,
    scaled_product,
)
from flashnorm.functional.scaled import why_not as scaled_why_not
from flashnorm.kernels import reference
from flashnorm.kernels.call import Call
from flashnorm.verification.bounds import unit_roundoff

STAGE = "scaled"
ROWS = (16, 4096)
DTYPES = {"fp8": FP8, "int8": INT8}
ABSORBED, FUSED, BEFORE = "norm in the scale", "norm and quantizing in one", "norm before"
PRODUCT = "product alone"
# Of one rounding of the result to bf16, so many: matrix units add FP8 products with 14 bits, less
# than float32 and more than bf16 has.
ROUNDINGS = 4

Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


def pieces(run: Run) -> Iterator[Piece]:
    """Errors and times, shape by shape."""
    for shape in PAPER:
        for count in ROWS:
            for name in DTYPES:
                key = {"shape": str(shape), "rows": count, "dtype": name}
                yield Piece(STAGE, key, 4.0, partial(_row, run, shape, count, name))


def _row(run: Run, shape: Shape, count: int, name: str) -> Row:
    if run.settings.dry:
        shape, count = shape.tiny(), min(count, DRY_ROWS)
    with torch.no_grad(), many_compilations():
        found = _measure(run, shape, count, DTYPES[name])
    run.say(f"{shape}, {count} rows, {name}: {found.get('microseconds', found)}")
    return found


def failures(run: Run) -> list[Row]:
    return [row for row in run.store.rows(STAGE) if row.get("wrong")]


def quantizers(dtype: torch.dtype, width: int) -> dict[str, Quantize]:
    """Ways from x to what the product takes."""

    def absorbed(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(x, dtype, norm="rms", eps=EPS)

    def normalized(x: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), None, EPS)

    def alone(z: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(z, dtype, norm="none")

    return {
        ABSORBED: absorbed,
        FUSED: lambda x: alone(normalized(x)),
        BEFORE: _in_two(normalized, alone),
    }


def _in_two(normalized: Callable[[Tensor], Tensor], alone: Quantize) -> Quantize:
    """The norm as PyTorch's own kernel, which is not compiled together with what follows."""
    return lambda x: alone(torch.compiler.disable(normalized)(x))


def _measure(run: Run, shape: Shape, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    device = run.settings.device
    x = torch.randn(rows, shape.n, device=device).to(torch.bfloat16)
    weights = _copies(shape, dtype, device)
    if reason := scaled_why_not(x, weights[0]):
        return {"failed": {ABSORBED: reason}}
    truth = _normalized(x) @ weights[0].dequantized().T
    failed, errors, prepared = {}, {}, {}
    for name, quantize in quantizers(dtype, shape.n).items():
        try:
            made = quantize if device == "cpu" else torch.compile(quantize, dynamic=False)
            errors[name] = _error(_product(made, x, weights[0]), truth)
            call = _caller(made, x, weights)
            prepared[name] = per_call(call, len(weights), device)
        except Exception as error:
            failed[name] = in_words(error)
    q, scale = quantize_rows(x, dtype, eps=EPS)
    own = q.double() * scale.double() @ weights[0].dequantized().T
    apart = _error(scaled_product(q, scale, weights[0], x.dtype), own)
    prepared[PRODUCT] = per_call(
        lambda i: scaled_product(q, scale, weights[i], x.dtype), len(weights), device
    )
    timings, more = in_turn(prepared, run.settings.rounds, SECONDS)
    allowed = ROUNDINGS * unit_roundoff(torch.bfloat16)
    return {
        "errors": errors,
        "from_own_terms": apart,
        "wrong": "" if apart <= allowed else f"{apart:.1e} off its own terms, not {allowed:.1e}",
        "microseconds": {name: timing.median * 1e6 for name, timing in timings.items()},
        "failed": {**failed, **more},
    }


def _copies(shape: Shape, dtype: torch.dtype, device: str) -> list[QuantizedWeight]:
    count = max(LEAST_COPIES, -(-2 * l2_bytes(device) // (shape.n * shape.k)))
    return [
        quantize_weight(torch.randn(shape.k, shape.n, device=device).div_(shape.n**0.5), dtype)
        for _ in range(count)
    ]


def _normalized(x: Tensor) -> Tensor:
    return reference.normalized(Call(x.double(), (), eps=EPS))


def _product(quantize: Quantize, x: Tensor, weight: QuantizedWeight) -> Tensor:
    return scaled_product(*quantize(x), weight, x.dtype)


def _caller(
    quantize: Quantize, x: Tensor, weights: list[QuantizedWeight]
) -> Callable[[int], Tensor]:
    return lambda i: _product(quantize, x, weights[i])


def _error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())
