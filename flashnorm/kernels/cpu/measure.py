"""Measure on this machine at how many rows of x which way to multiply is faster, and remember it.

The ways take turns, on copies of the weights that together exceed the caches; of several runs the
median counts. A crossover is chosen so that the product of all times is the least.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.errors import FlashNormError
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls, crossovers
from flashnorm.kernels.cpu.library import Library, load
from flashnorm.kernels.weights import DTYPES

# Of each shape class: (features, outputs).
SHAPES = {"narrow": (576, 1536), "wide": (2048, 2048)}
ROWS = (4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
AS_THEY_COME = 64  # rows above which that way is not asked any more
BEYOND = 1 << 26  # bytes of all copies of a weight: more than what caches hold per core
ROUNDS, SHORT = 5, 0.002  # seconds that a run takes at least
Way = Callable[[int], object]


@dataclass(frozen=True)
class Measured:
    """Seconds per call by way and rows, and what follows from them."""

    key: str
    seconds: dict[str, dict[int, float]]
    crossover: crossovers.Crossover


def measure(
    dtypes: Sequence[torch.dtype] = tuple(DTYPES),
    progress: Callable[[str], None] = lambda said: None,
) -> list[Measured]:
    """Measure every dtype and shape class on the chosen instruction set. Stores nothing.

    Raises FlashNormError where there are no kernels.
    """
    library = load()
    if isinstance(library, str):
        raise FlashNormError(f"there is nothing to tune: {library}")
    found = []
    with torch.no_grad(), _as_shipped(library):
        for dtype in dtypes:
            for n, k in SHAPES.values():
                found.append(_measure(library, dtype, n, k, progress))
    return found


def _measure(
    library: Library,
    dtype: torch.dtype,
    n: int,
    k: int,
    progress: Callable[[str], None],
) -> Measured:
    seconds: dict[str, dict[int, float]] = {"as they come": {}, "packed": {}, "library": {}}
    bytes_each = n * k * dtype.itemsize
    weights = [torch.randn(k, n).to(dtype) for _ in range(max(2, -(-BEYOND // bytes_each)))]
    name = crossovers.key(dtype, n)
    for count in ROWS:
        progress(f"{name} | {count} rows")
        ways = _ways(library, torch.randn(count, n).to(dtype), weights)
        for way, took in _in_turn(ways, len(weights)).items():
            seconds[way][count] = took
    return Measured(name, seconds, crossover(seconds))


def _ways(library: Library, x: Tensor, weights: list[Tensor]) -> dict[str, Way]:
    gain = torch.rand(x.shape[-1]).to(x.dtype) + 0.5
    held = [Call(x, (w,), eps=1e-5, gain=gain) for w in weights]  # for as long as they are run
    bound = [calls.pack(call) for call in held]
    number, wide = DTYPES[x.dtype], int(x.shape[-1] >= crossovers.NARROW)
    width, z = [weights[0].shape[0]], torch.empty_like(x)

    def kernel(packed_from: int) -> Way:
        def run(i: int) -> object:
            library.set_panel_rows(number, wide, packed_from)
            return calls.run_packed(bound[i], held[i].x, width, None)

        return run

    def by_torch(i: int) -> object:
        return F.linear(calls.normalize_packed(bound[i], held[i].x, z), weights[i])

    ways = {"as they come": kernel(crossovers.NEVER), "packed": kernel(1), "library": by_torch}
    if x.shape[0] > AS_THEY_COME:
        del ways["as they come"]
    return ways


def _in_turn(ways: dict[str, Way], copies: int) -> dict[str, float]:
    """Seconds of a call, the median of rounds in which each way runs once, warmed up."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            run(0)
            took[name].append(_timed(run, copies))
    return {name: statistics.median(values) for name, values in took.items()}


def _timed(run: Way, copies: int) -> float:
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < SHORT:
        run(count % copies)
        count += 1
    return (time.perf_counter() - start) / count


@contextmanager
def _as_shipped(library: Library) -> Iterator[None]:
    try:
        yield
    finally:
        crossovers.apply(library)


def crossover(seconds: dict[str, dict[int, float]]) -> crossovers.Crossover:
    """From what number of rows each way should take over, by times of `as they come`, `packed` and
    `library`."""
    plain, packed, library = (seconds[way] for way in ("as they come", "packed", "library"))
    start = _split({rows: (took, packed[rows]) for rows, took in plain.items()})
    ours = {rows: plain.get(rows, took) if rows < start else took for rows, took in packed.items()}
    end = _split({rows: (took, library[rows]) for rows, took in ours.items()})
    shown = [r for r in (1, 16, 64, 512) if r in ours] or [*ours][:3]
    note = ", ".join(f"{library[r] / ours[r]:.2f}x at {r} rows" for r in shown)
    most = max((rows for rows in ours if rows < end), default=0)
    return crossovers.Crossover(start, crossovers.NEVER if end > max(ours) else most, note)


def _split(times: dict[int, tuple[float, float]]) -> int:
    """Of (first, second) by rows: from which rows on the second should be taken."""
    rows = sorted(times)
    costs = {
        start: sum(math.log(times[r][r >= start]) for r in rows)
        for start in [*rows, crossovers.NEVER]
    }
    return min(costs, key=lambda start: costs[start])


def store(found: Sequence[Measured]) -> Path | None:
    """Remember measurements for this machine; None where that is switched off."""
    library = load()
    assert isinstance(library, Library)
    file = crossovers.store(library.isa, {row.key: row.crossover for row in found})
    crossovers.apply(library)
    return file
