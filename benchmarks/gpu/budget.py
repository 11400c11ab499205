"""Wall clock: for the whole run, and for each stage of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 20.0  # seconds after which a call that does not come back is interrupted


class OutOfTime(Exception):
    """The stage has used its time; what it found stays, and `--resume` goes on."""


class Budget:
    """Seconds that are left, of the run and of the stage that runs now."""

    def __init__(self, seconds: float) -> None:
        self.end = self._stage_end = time.monotonic() + seconds

    def left(self) -> float:
        return min(self.end, self._stage_end) - time.monotonic()

    def check(self, needed: float = 0.0) -> None:
        """Raise OutOfTime unless `needed` seconds are left."""
        if (left := self.left()) <= needed:
            raise OutOfTime(f"{max(left, 0):.0f} s were left, {needed:.0f} s were needed")

    @contextmanager
    def stage(self, seconds: float) -> Iterator[None]:
        """Within it no more than `seconds` are left, nor more than the run has."""
        self._stage_end = min(self.end, time.monotonic() + seconds)
        try:
            yield
        finally:
            self._stage_end = self.end


@contextmanager
def interruptible(budget: Budget) -> Iterator[None]:
    """SIGTERM, and the end of the budget within a call that never asks, are KeyboardInterrupt.

    That is no Exception, so nothing that goes on after a failure takes it for one.
    """
    before = {
        each: signal.signal(each, signal.default_int_handler)
        for each in (signal.SIGTERM, signal.SIGALRM)
    }
    signal.setitimer(signal.ITIMER_REAL, max(1.0, budget.left() + GRACE))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in before.items():
            signal.signal(each, handler)
