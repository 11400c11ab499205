"""Seconds of work on a device: replays of a CUDA graph between two events.

In a graph nothing waits for Python, on neither side of a comparison. Every graph holds a call for
each copy of the weights, which together exceed the second-level cache, so that each call reads its
weights from memory. Without a GPU (a dry run) the same calls run one after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from flashnorm.bench.records import Timing
from flashnorm.bench.timing import BUDGET, interleaved

LONG = 0.004  # seconds that one measurement takes at least, by replaying
WARM = 3  # calls before a capture: they compile, choose and allocate


T = TypeVar("T")
SPIN_CLOCK = 2e9  # cycles per second of a card that is faster than any: spins last long enough


def in_turn(
    runs: Mapping[str, Callable[[], float]], rounds: int, budget: float = BUDGET
) -> tuple[dict[str, Timing], dict[str, str]]:
    """`interleaved` without a rest: nothing spins on the cores of a GPU."""
    return interleaved(runs, rounds, budget, settle=0.0)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def per_call(run: Callable[[int], object], copies: int, device: str) -> Callable[[], float]:
    """A function that returns the seconds of one `run(i)`, a mean over all i below `copies`."""
    if device == "cpu":
        return lambda: _wall(run, copies) / copies
    replay = _graph(run, copies)
    _events(replay, 1)
    repeats = max(1, round(LONG / _events(replay, 1)))
    return lambda: _events(replay, repeats) / (repeats * copies)


def _graph(run: Callable[[int], object], copies: int) -> Callable[[], None]:
    """The calls as one graph. What they return is freed inside it, so that memory is reused."""

    def once(count: int) -> None:
        for i in range(count):
            run(i)

    return capture(lambda: once(min(WARM, copies)), lambda: once(copies))[0]


def capture(warm: Callable[[], object], run: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """A function that replays `run` as one CUDA graph, and what `run` returned: filled by replays.

    `warm` comes first, and does what may not be captured: it compiles, chooses and allocates.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as capturing demands of what runs for the first time
        warm()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def _events(replay: Callable[[], None], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _wall(run: Callable[[int], object], copies: int) -> float:
    start = time.perf_counter()
    for i in range(copies):
        run(i)
    return time.perf_counter() - start


def wall(run: Callable[[], object], device: str) -> Callable[[], float]:
    """A function that returns the seconds of one `run` by the clock, until the device is done."""

    def timed() -> float:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start

    return timed


def on_device(run: Callable[[], object], device: str, host: float) -> float:
    """Seconds that the device works on one `run`, which takes `host` seconds to be launched.

    The device waits in a kernel of its own until everything is launched, so that no gap is the
    host's. Without a GPU it is the time by the clock.
    """
    if device == "cpu":
        return wall(run, device)()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int((2 * host + 1e-3) * SPIN_CLOCK))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3
