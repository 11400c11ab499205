"""Norm + linear with packed weights: ours against our dense kernel and torch's own ways, in turn.

Ours is checked against float64 of the dequantized weights before it is timed, and not timed where
it is wrong. The others quantize x or round W, as they do: their errors stand beside their times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import correctness, ours
from benchmarks.gpu.environment import l2_bytes
from benchmarks.gpu.operations import DRY_ROWS, EPS, FEW, GATE_UP, LEAST_COPIES, PAPER, SECONDS
from benchmarks.gpu.records import Piece, Row, Run, Shape
from benchmarks.gpu.timing import in_turn, per_call
from flashnorm.bench.timing import in_words
from flashnorm.bench.variants import many_compilations
from flashnorm.functional.scaled import quantize_rows, quantize_weight, scaled_product
from flashnorm.kernels import reference, weights
from flashnorm.kernels.call import Call
from flashnorm.kernels.formats.groups import NIBBLE_ZERO
from flashnorm.kernels.weights import FP8, INT8, Weight

STAGE = "packed"
GROUP = 128
FORMATS = ("int8-rows", "int4-groups", "fp8-rows")
SHAPES = (*PAPER, GATE_UP[2])
OURS, DENSE = "ours", "ours, dense bf16"
COMPILED, LIBRARY = "dequantized, torch.compile", "library"

Runs = dict[str, Callable[[int], Tensor]]


def pieces(run: Run) -> Iterator[Piece]:
    """Every format and shape at 1 and at 16 rows."""
    for count in FEW:
        for shape in SHAPES:
            for name in FORMATS:
                key = {"shape": str(shape), "rows": count, "format": name}
                yield Piece(STAGE, key, 4.0, partial(_row, run, shape, count, name))


def _row(run: Run, shape: Shape, count: int, name: str) -> Row:
    if run.settings.dry:
        shape, count = shape.tiny(), min(count, DRY_ROWS)
    with torch.no_grad(), many_compilations():
        found = _measure(run, shape, count, name)
    run.say(f"{shape}, {count} rows, {name}: {found.get('microseconds', found['wrong'])}")
    return found


def failures(run: Run) -> list[Row]:
    """Rows in which ours is wrong or did not run."""
    return [row for row in run.store.rows(STAGE) if row["wrong"]]


def pack(name: str, k: int, n: int, device: str) -> Weight:
    """A random W [k, n] of about n^-0.5, packed by its largest magnitudes."""
    w = torch.randn(k, n, device=device).div_(n**0.5)
    if name == "int4-groups":
        group = min(GROUP, n & -n)
        grouped = w.unflatten(1, (-1, group))
        scales = grouped.abs().amax(2) / (NIBBLE_ZERO - 1)
        q = (grouped / scales[..., None]).round().add_(NIBBLE_ZERO).to(torch.uint8).flatten(1)
        values = q[:, ::2] | (q[:, 1::2] << 4)
        return Weight(values, weights.find(name), scales.bfloat16(), k, n, group)
    return quantize_weight(w, FP8 if name == "fp8-rows" else INT8)


def dequantized(weight: Weight) -> Tensor:
    """W in bf16, by operations that torch.compile fuses: what a model without a kernel does."""
    assert weight.scales is not None
    q = weight.values
    if weight.format.name == "int4-groups":
        q = torch.stack([q & 15, q >> 4], -1).flatten(-2).to(torch.int8) - NIBBLE_ZERO
        q = q.unflatten(1, (-1, weight.group)).bfloat16() * weight.scales[..., None].bfloat16()
        return q.flatten(1)
    return (q.bfloat16() * weight.scales.bfloat16())[: weight.outputs, : weight.features]


def _measure(run: Run, shape: Shape, rows: int, name: str) -> dict[str, Any]:
    device = run.settings.device
    x = torch.randn(rows, shape.n, device=device).to(torch.bfloat16)
    gain = (torch.rand(shape.n, device=device) + 0.5).to(torch.bfloat16)
    size = shape.n * shape.k // (2 if name == "int4-groups" else 1)
    count = max(LEAST_COPIES, -(-2 * l2_bytes(device) // size))
    calls = [
        Call(x, (pack(name, shape.k, shape.n, device),), eps=EPS, gain=gain) for _ in range(count)
    ]
    try:
        wrong = correctness.Expected(calls[0], ours.CHOSEN).wrong(ours.run(calls[0]))
    except Exception as error:
        wrong = in_words(error)
    if wrong:
        return {"wrong": wrong}
    runs: Runs = {OURS: lambda i: ours.run(calls[i])[0]}
    runs |= _others(calls, device)
    truth = reference.norm_linear(
        calls[0]._replace(x=x.double(), weights=[packed_of(calls[0]).dequantized()])
    )[0]
    errors, failed, prepared = {}, {}, {}
    for each, made in runs.items():
        try:
            errors[each] = float((made(0).double() - truth).norm() / truth.norm())
            prepared[each] = per_call(made, count, device)
        except Exception as error:
            failed[each] = in_words(error)
    timings, more = in_turn(prepared, run.settings.rounds, SECONDS)
    median = {each: timing.median for each, timing in timings.items()}
    floor = size / run.ceiling["bytes"]
    return {
        "wrong": "" if OURS in median else {**failed, **more}[OURS],
        "errors": errors,
        "microseconds": {each: value * 1e6 for each, value in median.items()},
        "of_bandwidth": floor / median[OURS] if OURS in median else None,
        "way": ours.explain(calls[0]),
        "failed": {**failed, **more},
    }


def packed_of(call: Call) -> Weight:
    (weight,) = call.weights
    assert isinstance(weight, Weight)
    return weight


def _others(calls: list[Call], device: str) -> Runs:
    """The dense kernel on the same W in bf16, W dequantized by torch.compile, and the library's."""
    x, gain = calls[0].x, calls[0].gain
    held = [packed_of(call) for call in calls]
    name, width = held[0].format.name, x.shape[-1:]
    # As many dense copies as packed ones are larger than the second cache too: fewer are enough.
    some = [dequantized(weight) for weight in held[: max(LEAST_COPIES, len(held) // 2)]]
    dense = [calls[0]._replace(weights=(weight,)) for weight in some]

    def normalized() -> Tensor:
        return F.rms_norm(x, width, gain, EPS)

    def product(values: Tensor, scales: Tensor) -> Tensor:
        return F.linear(normalized(), dequantized(held[0]._replace(values=values, scales=scales)))

    made = product if device == "cpu" else torch.compile(product, dynamic=False)
    runs: Runs = {
        DENSE: lambda i: ours.run(dense[i % len(dense)])[0],
        COMPILED: lambda i: made(held[i].values, held[i].scales),
    }
    if name == "int4-groups":
        return {**runs, **_int4(held, normalized)} if device != "cpu" else runs

    def by_library(i: int) -> Tensor:
        q, scale = quantize_rows(normalized(), held[0].dtype, norm="none")
        return scaled_product(q, scale, held[i], x.dtype)

    return {**runs, LIBRARY: by_library}


def _int4(held: list[Weight], normalized: Callable[[], Tensor]) -> Runs:
    """torch's own kernel for groups of 4 bits, which wants its own layout."""
    packed = []
    for weight in held:
        assert weight.scales is not None
        # The even feature in the high half; scales and zeros as [groups, k, 2].
        values = torch.ops.aten._convert_weight_to_int4pack(
            (weight.values >> 4) | (weight.values << 4), 8
        )
        scales = weight.scales.T
        numbers = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
        packed.append((values, numbers))

    def run(i: int) -> Tensor:
        values, numbers = packed[i]
        return torch.ops.aten._weight_int4pack_mm(normalized(), values, held[0].group, numbers)

    return {LIBRARY: run}
