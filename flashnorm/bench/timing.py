"""Measuring several things in turn, so that what disturbs one disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from flashnorm.bench.records import Timing

Key = TypeVar("Key", bound=Hashable)

BUDGET = 120.0  # seconds after which a group ends, once it has FEWEST rounds
FEWEST = 3
SETTLE = 0.02  # seconds after which the threads of the run before no longer spin on the cores
SHORT = 0.02  # what takes less is repeated within a round


def interleaved(
    runs: Mapping[Key, Callable[[], float]],
    rounds: int,
    budget: float = BUDGET,
    settle: float = SETTLE,
    progress: Callable[[str], None] = lambda said: None,
) -> tuple[dict[Key, Timing], dict[Key, str]]:
    """The timings of all `runs`, which return seconds, and why those that raised have none.

    Every round calls each of them once, beginning with another one each time, and every second one
    backwards. A first round warms up and is not counted. There are fewer than `rounds` where these
    would take over `budget`. Before each run there are `settle` seconds of rest, which nothing on a
    GPU needs. `progress` is told which of them runs, and about how long the rest will take.
    """
    left, errors = dict(runs), dict[Key, str]()
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    start = time.perf_counter()
    for number in range(rounds + 1):
        ahead = _ahead(number, rounds, time.perf_counter() - start, budget)
        for key in _turned(list(left), number):
            progress(f"{_words(key)}, {ahead}")
            time.sleep(settle)
            try:
                took = left[key]()
            except Exception as error:
                errors[key] = in_words(error)
                del left[key]
                continue
            if number:
                seconds[key].append(took)
        if number >= FEWEST and time.perf_counter() - start > budget:
            break
    return {key: Timing(tuple(seconds[key])) for key in left}, errors


def _words(key: Hashable) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _ahead(number: int, rounds: int, took: float, budget: float) -> str:
    """Which round this is, and what is left by the pace so far: the first one only warms up."""
    if not number:
        return "warming up"
    pace = took / number
    last = max(FEWEST, min(rounds, int(budget / pace) if pace else rounds))
    left = pace * (min(rounds, last) + 1 - number)
    return f"round {number} of {rounds}, about {left:.0f} s left"


def _turned(keys: list[Key], number: int) -> list[Key]:
    """Each round begins with another one, and every second one runs backwards: what runs next to
    what leaves traces, such as threads that spin on."""
    by = number % len(keys) if keys else 0
    turned = keys[by:] + keys[:by]
    return turned[::-1] if number % 2 else turned


def stopwatch(run: Callable[[], object]) -> Callable[[], float]:
    """A function that returns the seconds of one `run`, the mean of several where it is short."""

    def timed() -> float:
        start = time.perf_counter()
        calls = 0
        while not calls or time.perf_counter() - start < SHORT:
            run()
            calls += 1
        return (time.perf_counter() - start) / calls

    return timed


def in_words(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
