"""Norm + linear, shape by shape: ours against norm + matmul and torch.compile, in one run.

Ours is checked against float64 before it is timed, and not timed where it is wrong; so are the
others, which are timed all the same, and marked. Every row stays in the table whoever wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import baselines, correctness, ours
from benchmarks.gpu.environment import l2_bytes
from benchmarks.gpu.records import DTYPES, Piece, Row, Run, Shape
from benchmarks.gpu.timing import in_turn, per_call
from flashnorm.bench.records import Timing
from flashnorm.bench.timing import in_words
from flashnorm.bench.variants import many_compilations
from flashnorm.kernels.call import Call

STAGE = "operations"
PAPER = (Shape(576, 960), Shape(2048, 2560), Shape(4096, 6144))
GATE_UP = (Shape(576, 3072), Shape(2048, 16384), Shape(4096, 28672))
GLU = tuple(Shape(shape.n, shape.k, True) for shape in GATE_UP)
SHAPES = (*PAPER, *GLU, *GATE_UP)
FEW = (1, 16)  # rows, at which the compiler of the other side tries everything
MANY = (64, 4096, 256, 1024)
DRY_ROWS = 64  # of a dry run, at most
EPS = 1e-5
LEAST_COPIES = 8
OURS, OURS_GAIN = "ours", "ours, gain on load"
# Ours without a part of it, to see what that is worth.
LATE, WHOLE, APART = "ours, started late", "ours, n in one part", "ours, weights apart"
WITHOUT = (LATE, WHOLE, APART)
TORCH, TRITON, COMPILED = "torch norm + matmul", "triton norm + matmul", "torch.compile"
LINEAR = "matmul alone"
SECONDS = 2.0  # for the rounds of one row, at most
TUNED_PIECE, PLAIN_PIECE = 6.6, 2.5  # seconds of a row, with what it compiles
# Roundings to bf16 in an eager gate beyond those of a library's matmul: the result of silu.
EAGER_GATE = 1

Runs = dict[str, Callable[[int], object]]


def few(run: Run) -> Iterator[Piece]:
    """All shapes at 1 row, then at 16, with torch.compile at its best."""
    yield from _pieces(run, SHAPES, FEW, "bf16", baselines.TUNED)


def many(run: Run) -> Iterator[Piece]:
    yield from _pieces(run, (*PAPER, *GLU), MANY, "bf16", baselines.PLAIN)


def single(run: Run) -> Iterator[Piece]:
    """One row in float32."""
    yield from _pieces(run, PAPER, (1,), "fp32", baselines.PLAIN)


def _pieces(
    run: Run, shapes: tuple[Shape, ...], rows: tuple[int, ...], dtype: str, mode: str
) -> Iterator[Piece]:
    seconds = TUNED_PIECE if mode == baselines.TUNED else PLAIN_PIECE
    for count in rows:
        for shape in shapes:
            key = {"shape": str(shape), "rows": count, "dtype": dtype}
            yield Piece(STAGE, key, seconds, partial(_row, run, shape, count, dtype, mode))


def _row(run: Run, shape: Shape, count: int, dtype: str, mode: str) -> Row:
    if run.settings.dry:
        shape, count = shape.tiny(), min(count, DRY_ROWS)
    with torch.no_grad(), many_compilations():
        given = _inputs(shape, count, copies(shape, run.settings.device, DTYPES[dtype]))
        row = _measure(run, shape, given, "" if run.settings.device == "cpu" else mode)
    run.say(f"{shape}, {count} rows, {dtype}: {_summary(row)}")
    return row


def failures(run: Run) -> list[Row]:
    """Rows in which ours is wrong or did not run."""
    return [row for row in run.store.rows(STAGE) if row["excluded"]]


def _summary(row: Row) -> str:
    if row["excluded"]:
        return f"not timed: {row['excluded']}"
    times = f"{row['microseconds'][OURS]:.1f} µs"
    return f"{times}, {row['speedup']:.2f}x over {row['best']}" if row["best"] else times


def copies(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """As many as exceed twice the second-level cache, all random."""
    size = dtype.itemsize * shape.n * shape.k
    count = max(LEAST_COPIES, -(-2 * l2_bytes(device) // size))
    return [
        torch.randn(shape.k, shape.n, device=device).div_(shape.n**0.5).to(dtype)
        for _ in range(count)
    ]


def _inputs(shape: Shape, rows: int, weights: list[Tensor]) -> baselines.Inputs:
    device, dtype = weights[0].device, weights[0].dtype
    x = torch.randn(rows, shape.n, device=device).to(dtype)
    gain = (torch.rand(shape.n, device=device) + 0.5).to(dtype)
    return baselines.Inputs(x, gain, weights, EPS, shape.glu)


def calls_of(given: baselines.Inputs, with_gain: bool) -> list[Call]:
    """Our side, for every copy; without a gain it is what a fold has left."""
    gain, activation = given.gain if with_gain else None, "silu" if given.glu else None
    return [
        Call(
            given.x,
            tuple(weight.chunk(2)) if given.glu else (weight,),
            eps=given.eps,
            gain=gain,
            activation=activation,
        )
        for weight in given.weights
    ]


def _measure(run: Run, shape: Shape, given: baselines.Inputs, mode: str) -> Row:
    row: Row = {"n": shape.n, "k": shape.k, "glu": shape.glu, "excluded": "", "wrong": {}}
    own, failed = _ours(given)
    if OURS in failed:
        return {**row, "excluded": failed[OURS]}
    row |= {"way": ours.explain(calls_of(given, False)[0]), "compile": mode}
    others = _others(given, mode, run.settings.device)
    row["wrong"], more = _wrong(others, given)
    runs = {**own, **{name: each for name, each in others.items() if name not in more}}
    prepared, unprepared = _prepared(runs, len(given.weights), run.settings.device)
    timings, errors = in_turn(prepared, run.settings.rounds, SECONDS)
    failed |= {**more, **unprepared, **errors}
    if OURS not in timings:
        return {**row, "excluded": failed[OURS]}
    rows, size = given.x.shape[0], given.x.element_size()
    found = weighed(shape, rows, timings, run.ceiling, size)
    return {**row, **found, "failed": failed}


def _prepared(
    runs: Runs, copied: int, device: str
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """The runs as graphs, and why some are not.

    What torch.compile made belongs to the setting it was made under; the other sides add up as
    they please while they are timed.
    """
    prepared, failed = {}, {}
    for name, each in runs.items():
        try:
            with correctness.exact_sums() if name == COMPILED else nullcontext():
                prepared[name] = per_call(each, copied, device)
        except Exception as error:
            failed[name] = in_words(error)
    return prepared, failed


def _ours(given: baselines.Inputs) -> tuple[Runs, dict[str, str]]:
    """Both forms of our side, those that are right, and what is wrong with the others."""
    runs: Runs = {}
    failed: dict[str, str] = {}
    for name, with_gain in ((OURS, False), (OURS_GAIN, True)):
        calls = calls_of(given, with_gain)
        try:
            with correctness.exact_sums():
                found = ours.run(calls[0])
            reason = correctness.Expected(calls[0], ours.CHOSEN).wrong(found)
        except Exception as error:
            reason = in_words(error)
        if reason:
            failed[name] = reason
        else:
            runs[name] = partial(_run_one, calls)
    if OURS in runs:
        runs |= _without(calls_of(given, False))
    return runs, failed


def _run_one(calls: list[Call], i: int) -> list[Tensor]:
    return ours.run(calls[i])


def _without(calls: list[Call]) -> Runs:
    """The same without one part each, where the call has it."""
    call = calls[0]
    runs: Runs = {}
    way = ours.way_of(call, ours.CHOSEN)
    if way == "skinny":
        if ours.starts_early(call):
            runs[LATE] = partial(_run_late, calls)
        if (tile := ours.skinny_tile(call)).splits > 1:
            runs[WHOLE] = partial(_run_tile, calls, replace(tile, splits=1))
    elif (
        way == "matmul" and call.activation is not None
    ):  # the halves of one weight, in an order that is not theirs
        turned = [each._replace(weights=tuple(reversed(each.weights))) for each in calls]
        runs[APART] = partial(_run_one, turned)
    return runs


def _run_late(calls: list[Call], i: int) -> list[Tensor]:
    with ours.switched_off("early"):
        return ours.run(calls[i])


def _run_tile(calls: list[Call], tile: Any, i: int) -> list[Tensor]:
    return ours.run(calls[i], "skinny", tile)


def _others(given: baselines.Inputs, mode: str, device: str) -> Runs:
    """The other sides, as strong as they get."""
    makers: Runs = {TORCH: baselines.torch_norm(given)}
    if device != "cpu":
        makers[TRITON] = baselines.triton_norm(given)
    if mode:
        makers[COMPILED] = baselines.compiled(given, mode)
    return {**makers, LINEAR: baselines.linear_alone(given)}


def _wrong(others: Runs, given: baselines.Inputs) -> tuple[dict[str, str], dict[str, str]]:
    """Which of them compute something else than ours do, and which do not run at all."""
    expected = correctness.Expected(calls_of(given, True)[0], ours.LIBRARY)
    wrong, failed = {}, {}
    for name in others.keys() - {LINEAR}:
        try:
            with correctness.exact_sums():
                found = others[name](0)
            assert isinstance(found, Tensor)
            if reason := expected.wrong([found], EAGER_GATE if given.glu else 0):
                wrong[name] = reason
        except Exception as error:
            failed[name] = in_words(error)
    return wrong, failed


def weighed(
    shape: Shape,
    rows: int,
    timings: dict[str, Timing],
    ceiling: dict[str, float],
    size: int = 2,
) -> dict[str, Any]:
    """Medians, the speedup over the best other side, and the share of what the card can do.

    size: bytes of an element.
    """
    median = {name: timing.median for name, timing in timings.items()}
    rivals = {name: median[name] for name in (TORCH, TRITON, COMPILED) if name in median}
    best = min(rivals, key=lambda name: rivals[name], default="")
    floor, limit = roofline(shape, rows, ceiling, size)
    return {
        "microseconds": {name: value * 1e6 for name, value in median.items()},
        "lowest": {name: min(timing.seconds) * 1e6 for name, timing in timings.items()},
        "highest": {name: max(timing.seconds) * 1e6 for name, timing in timings.items()},
        "best": best,
        "speedup": rivals[best] / median[OURS] if best else None,
        "floor_microseconds": floor * 1e6,
        "limit": limit,
        "of_roofline": floor / median[OURS],
    }


def roofline(
    shape: Shape, rows: int, ceiling: dict[str, float], size: int = 2
) -> tuple[float, str]:
    """The seconds that bytes and operations need at least, and which of the two need them.

    x and W are read once and y is written once, in elements of `size` bytes; a multiplication and
    an addition are two. (The rate of operations is that of bf16.)
    """
    width = shape.k // 2 if shape.glu else shape.k
    moved = size * (shape.n * shape.k + rows * shape.n + rows * width)
    times = {
        "memory": moved / ceiling["bytes"],
        "arithmetic": 2 * rows * shape.n * shape.k / ceiling["operations"],
    }
    limit = max(times, key=lambda name: times[name])
    return times[limit], limit
