"""Wall clock: for the whole run, and for each stage of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(Exception):
    """The stage has used its time; what it found stays, and `--resume` goes on."""


class Clock:
    """The time that passes."""

    def now(self) -> float:
        return time.monotonic()

    def spend(self, seconds: float) -> None:
        """What a piece was expected to take: here it has taken what it took."""


class Simulated(Clock):
    """Time that passes only as it is spent: a dry run takes what a card is expected to."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def spend(self, seconds: float) -> None:
        self._now += seconds


class Budget:
    """Seconds that are left, of the run and of the stage that runs now.

    What a stage leaves is the next one's.
    """

    def __init__(self, seconds: float, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.end = self._stage_end = self.clock.now() + seconds
        self._spare = 0.0

    def left(self) -> float:
        return min(self.end, self._stage_end) - self.clock.now()

    def check(self, needed: float = 0.0) -> None:
        """Raise OutOfTime unless `needed` seconds are left."""
        if (left := self.left()) < needed or left <= 0:
            raise OutOfTime(f"{max(left, 0):.0f} s were left, {needed:.0f} s were needed")

    @contextmanager
    def stage(self, seconds: float) -> Iterator[None]:
        """Within it no more than `seconds` and what earlier stages left, nor than the run has."""
        start = self.clock.now()
        allowed = seconds + self._spare
        self._stage_end = min(self.end, start + allowed)
        try:
            yield
        finally:
            self._spare = max(0.0, allowed - (self.clock.now() - start))
            self._stage_end = self.end
