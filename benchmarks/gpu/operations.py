"""Norm + linear, shape by shape: ours against norm + matmul and torch.compile, in one run.

Every row is checked against float64 before it is timed, and stays in the table whoever wins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import baselines, correctness, ours
from benchmarks.gpu.environment import l2_bytes
from benchmarks.gpu.nouns import Run, Shape
from benchmarks.gpu.timing import per_call
from flashnorm.bench.nouns import Timing
from flashnorm.bench.timing import in_words, interleaved
from flashnorm.bench.variants import many_compilations
from flashnorm.kernels.call import Call

STAGE = "operations"
PAPER = (Shape(576, 960), Shape(2048, 2560), Shape(4096, 6144))
GATE_UP = (Shape(576, 3072), Shape(2048, 16384), Shape(4096, 28672))
SHAPES = (*PAPER, *(Shape(s.n, s.k, True) for s in GATE_UP), *GATE_UP)
ROWS = (1, 16, 64, 256, 1024, 4096)
DRY_SHAPES, DRY_ROWS = (Shape(32, 48), Shape(32, 64, True)), (1, 16)
EPS = 1e-5
LEAST_COPIES = 8
OURS, OURS_GAIN = "ours", "ours, gain on load"
TORCH, TRITON, COMPILED = "torch norm + matmul", "triton norm + matmul", "torch.compile"
LINEAR = "matmul alone"
SECONDS = 3.0  # for the rounds of one row, at most
PLAIN_SECONDS = 2.0  # for a row without tuning, all in all
# Roundings to bf16 in an eager gate beyond those of a library's matmul: the result of silu.
EAGER_GATE = 1

Runs = dict[str, Callable[[int], object]]


def operations(run: Run) -> None:
    """Time all shapes, the paper's first, as far as the stage's time reaches."""
    shapes, rows = (DRY_SHAPES, DRY_ROWS) if run.settings.dry else (SHAPES, ROWS)
    left = [
        (shape, count)
        for shape in shapes
        for count in rows
        if not run.store.find(STAGE, shape=str(shape), rows=count)
    ]
    weights: tuple[Shape | None, list[Tensor]] = (None, [])
    for at, (shape, count) in enumerate(left):
        run.budget.check(SECONDS)
        if weights[0] != shape:
            weights = (None, [])  # first free what was there
            weights = (shape, copies(shape, run.settings.device))
        mode = _mode(run, len(left) - at)
        with torch.no_grad(), many_compilations():
            row = _measure(run, shape, _inputs(shape, count, weights[1]), mode)
        run.store.put(STAGE, {"shape": str(shape), "rows": count}, row)
        run.say(f"{shape}, {count} rows: {_summary(row)}")


def _mode(run: Run, left: int) -> str:
    """How hard torch.compile may try, so that all rows are reached; empty where it is left out."""
    if run.settings.dry:
        return ""
    spare = run.budget.left() - left * PLAIN_SECONDS
    return baselines.TUNED if spare > baselines.TUNING_SECONDS else baselines.PLAIN


def _summary(row: dict[str, Any]) -> str:
    if row["excluded"]:
        return f"not timed: {row['excluded']}"
    times = f"{row['microseconds'][OURS]:.1f} µs"
    return f"{times}, {row['speedup']:.2f}x over {row['best']}" if row["best"] else times


def copies(shape: Shape, device: str) -> list[Tensor]:
    """As many as exceed twice the second-level cache, all random."""
    size = 2 * shape.n * shape.k
    count = max(LEAST_COPIES, -(-2 * l2_bytes(device) // size))
    return [
        torch.randn(shape.k, shape.n, device=device).div_(shape.n**0.5).to(torch.bfloat16)
        for _ in range(count)
    ]


def _inputs(shape: Shape, rows: int, weights: list[Tensor]) -> baselines.Inputs:
    device = weights[0].device
    x = torch.randn(rows, shape.n, device=device).to(torch.bfloat16)
    gain = (torch.rand(shape.n, device=device) + 0.5).to(torch.bfloat16)
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


def _measure(run: Run, shape: Shape, given: baselines.Inputs, mode: str) -> dict[str, Any]:
    row: dict[str, Any] = {"n": shape.n, "k": shape.k, "glu": shape.glu, "excluded": ""}
    own, failed = _ours(given)
    if OURS in failed:
        return {**row, "excluded": failed[OURS]}
    row |= {"way": ours.explain(calls_of(given, False)[0]), "compile": mode}
    others, more = _others(given, mode)
    prepared, unprepared = _prepared({**own, **others}, given)
    timings, errors = interleaved(prepared, run.settings.rounds, SECONDS)
    failed |= {**more, **unprepared, **errors}
    if OURS not in timings:
        return {**row, "excluded": failed[OURS]}
    found = weighed(shape, given.x.shape[0], timings, run.ceiling)
    return {**row, **found, "failed": failed}


def _prepared(
    runs: Runs, given: baselines.Inputs
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """The runs as graphs, and why some are not."""
    prepared, failed = {}, {}
    for name, each in runs.items():
        try:
            prepared[name] = per_call(each, len(given.weights), given.x.device.type)
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
            found = ours.run(calls[0])
            reason = correctness.Expected(calls[0], ours.CHOSEN).wrong(found)
        except Exception as error:
            reason = in_words(error)
        if reason:
            failed[name] = reason
        else:
            runs[name] = partial(_run_one, calls)
    return runs, failed


def _run_one(calls: list[Call], i: int) -> list[Tensor]:
    return ours.run(calls[i])


def _others(given: baselines.Inputs, mode: str) -> tuple[Runs, dict[str, str]]:
    """The other sides that compute what ours do, and why the rest is missing."""
    makers = {TORCH: baselines.torch_norm(given)}
    if given.x.device.type != "cpu":
        makers[TRITON] = baselines.triton_norm(given)
    if mode:
        makers[COMPILED] = baselines.compiled(given, mode)
    expected = correctness.Expected(calls_of(given, True)[0], ours.LIBRARY)
    failed = {}
    for name, each in list(makers.items()):
        try:
            reason = expected.wrong([each(0)], EAGER_GATE if given.glu else 0)
        except Exception as error:
            reason = in_words(error)
        if reason:
            failed[name] = reason
            del makers[name]
    return {**makers, LINEAR: baselines.linear_alone(given)}, failed


def weighed(
    shape: Shape, rows: int, timings: dict[str, Timing], ceiling: dict[str, float]
) -> dict[str, Any]:
    """Medians, the speedup over the best other side, and the share of what the card can do."""
    median = {name: timing.median for name, timing in timings.items()}
    rivals = {name: median[name] for name in (TORCH, TRITON, COMPILED) if name in median}
    best = min(rivals, key=lambda name: rivals[name], default="")
    floor, limit = roofline(shape, rows, ceiling)
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


def roofline(shape: Shape, rows: int, ceiling: dict[str, float]) -> tuple[float, str]:
    """The seconds that bytes and operations need at least, and which of the two need them.

    x and W are read once and y is written once, in bf16; a multiplication and an addition are two.
    """
    width = shape.k // 2 if shape.glu else shape.k
    moved = 2 * (shape.n * shape.k + rows * shape.n + rows * width)
    times = {
        "memory": moved / ceiling["bytes"],
        "arithmetic": 2 * rows * shape.n * shape.k / ceiling["operations"],
    }
    limit = max(times, key=lambda name: times[name])
    return times[limit], limit
