"""Launches and crossovers, measured: the fastest way of every call here, and the tile it takes.

What is found goes into WORK/gpu.json, the file that the library reads (`FLASHNORM_GPU_CACHE`), call
by call; the stages after this one run on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import correctness, operations, ours
from benchmarks.gpu.records import Piece, Row, Run, Shape
from benchmarks.gpu.timing import per_call
from benchmarks.model_shapes import CONFIGURATIONS
from flashnorm.kernels import norms
from flashnorm.kernels.call import Call

STAGE = "tune"
FEW, MANY = (1, 16, 64), (256, 1024, 4096)
SECONDS = 5.0  # for one call, before it keeps what it has
REPEATS = 3
LEAST_GAIN = 0.98  # of the time so far: less than that is noise
# Of a tile's numbers, the least and the most that are tried; each is doubled and halved.
LIMITS = {"columns": (4, 256), "depth": (16, 1024), "warps": (1, 16), "splits": (1, 8)}
STAGES = (2, 6)

Timer = Callable[[Any], float]


@dataclass(frozen=True)
class Task:
    """A call to be tuned: the weights of one norm or none, and how many rows x has."""

    n: int
    widths: tuple[int, ...]
    rows: int
    norm: str = "rms"
    gain: bool = False
    activation: str | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.n, sum(self.widths))


def tasks(models: tuple[str, ...]) -> Iterator[Task]:
    """Decoding first: the shapes of the operations, then the models' own calls, then prefill."""
    for rows in FEW:
        yield from _operations(rows)
    for name in models:
        yield from _calls_of(CONFIGURATIONS[name])
    for rows in MANY:
        yield from _operations(rows)


def _operations(rows: int) -> Iterator[Task]:
    for shape in operations.SHAPES:
        widths = (shape.k // 2,) * 2 if shape.glu else (shape.k,)
        for gain in (False, True):
            yield Task(shape.n, widths, rows, "rms", gain, "silu" if shape.glu else None)


def _calls_of(shape: dict[str, Any]) -> Iterator[Task]:
    """One decoded token of a layer: q, k and v; their output; gate and up; down; the head."""
    n, inner = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim", n // shape["num_attention_heads"])
    wide, narrow = (head * shape[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    yield Task(n, (wide, narrow, narrow), 1, gain=True)
    yield Task(n, (inner, inner), 1, gain=True, activation="silu")
    yield Task(n, (inner, inner), 1, "none", activation="silu")
    for width, k in ((wide, n), (inner, n), (n, shape["vocab_size"])):
        yield Task(width, (k,), 1, "none")


def pieces(run: Run) -> Iterator[Piece]:
    """As many calls as the stage's time reaches; a later run goes on."""
    if run.settings.device == "cpu" or ours.kernels() is None:
        run.say("tune: there are no kernels of a GPU to tune here")
        return
    for task in tasks(run.settings.models):
        yield Piece(STAGE, {"task": str(task)}, SECONDS, partial(_row, run, task))


@torch.no_grad()
def _row(run: Run, task: Task) -> Row:
    found = _tuned(run, task)
    run.say(f"{task}: {found['note']}")
    return found


def _tuned(run: Run, task: Task) -> Row:
    """Measure all ways of one call and keep the fastest that is right."""
    from flashnorm.kernels.gpu import cached, launch

    calls = _calls(task, run.settings.device)
    device, end = launch.device_of(calls[0].x), run.budget.left() - SECONDS
    best: dict[str, tuple[float, Any]] = {"matmul": (_seconds(run, calls, "matmul", None), None)}
    for way, tile in _starts(task, calls[0].x.dtype, device).items():
        timer = _timer(run, calls, way)
        spare = _spare(run, end)
        ahead = _compiler(calls[0], way)
        found, seconds = search(tile, timer, spare, ahead)
        best[way] = (seconds, found)
    order = sorted(best, key=lambda way: best[way][0])
    chosen = next((way for way in order if _right(calls[0], way, best[way][1])), "matmul")
    times = {way: best[way][0] * 1e6 for way in order if math.isfinite(best[way][0])}
    note = ", ".join(f"{way} {value:.2f} µs" for way, value in times.items())
    tile = best[chosen][1]
    cached.store(device, {cached.key_of(calls[0]): cached.Entry(chosen, note, tile)})
    return {"way": chosen, "note": note, "microseconds": times, "tile": vars(tile) if tile else {}}


def _spare(run: Run, end: float) -> Callable[[], bool]:
    return lambda: run.budget.left() > end


def _calls(task: Task, device: str) -> list[Call]:
    """The call on every copy of its weights."""
    n, x = task.n, torch.randn(task.rows, task.n, device=device).to(torch.bfloat16)
    gain = (torch.rand(n, device=device) + 0.5).to(torch.bfloat16) if task.gain else None
    return [
        Call(
            x,
            tuple(weight.split(task.widths)),
            norm=norms.find(task.norm),
            eps=operations.EPS,
            gain=gain,
            activation=task.activation,
        )
        for weight in operations.copies(task.shape, device, torch.bfloat16)
    ]


def _starts(task: Task, dtype: torch.dtype, device: Any) -> dict[str, Any]:
    """The ways that have tiles, with their defaults: few rows, many rows, and both between."""
    from flashnorm.kernels.gpu import launch

    gated, starts = task.activation is not None, {}
    widths = task.widths[:1] if gated else task.widths
    if task.rows <= launch.MOST_ROWS:
        starts["skinny"] = launch.skinny_tile(task.rows, task.n, widths, dtype, gated, device)
    if task.rows >= launch.MOST_ROWS:
        starts["gemm"] = launch.gemm_tile(task.rows, widths[0], dtype, gated, device)
    return starts


def _timer(run: Run, calls: list[Call], way: str) -> Timer:
    return lambda tile: _seconds(run, calls, way, tile)


def _seconds(run: Run, calls: list[Call], way: str, tile: Any) -> float:
    """The fastest of a few measurements; infinite where the card cannot run it."""
    try:
        timed = per_call(lambda i: ours.run(calls[i], way, tile), len(calls), run.settings.device)
        return min(timed() for _ in range(REPEATS))
    except Exception:
        torch.cuda.synchronize()
        return math.inf


def _right(call: Call, way: str, tile: Any) -> bool:
    try:
        return not correctness.Expected(call, way).wrong(ours.run(call, way, tile))
    except Exception:
        return False


def _compiler(call: Call, way: str) -> Callable[[list[Any]], None]:
    """Compiles tiles at once, so that timing finds them compiled."""
    return lambda tiles: ours.compile_ahead([(call, way, tile) for tile in tiles])


def search(
    first: Any,
    timer: Timer,
    spare: Callable[[], bool],
    ahead: Callable[[list[Any]], None] = lambda tiles: None,
) -> tuple[Any, float]:
    """Go from tile to the fastest neighbour while that is faster and there is time."""
    best, least = first, timer(first)
    seen = {first}
    while spare():
        near = [tile for tile in neighbours(best) if tile not in seen]
        if not near:
            break
        ahead(near)
        seen |= set(near)
        times = {tile: timer(tile) for tile in near if spare()}
        tile = min(times, key=lambda each: times[each], default=best)
        if times.get(tile, math.inf) > LEAST_GAIN * least:
            break
        best, least = tile, times[tile]
    return best, least


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles that differ in one number."""
    for name, (least, most) in LIMITS.items():
        value = getattr(tile, name)
        for other in (value // 2, value * 2):
            if least <= other <= most:
                yield replace(tile, **{name: other})
    for stages in (tile.stages - 1, tile.stages + 1):
        if STAGES[0] <= stages <= STAGES[1]:
            yield replace(tile, stages=stages)
