"""Attacks by number: each is drawn from its seed alone, is bounded in time, and is judged."""

from __future__ import annotations

import logging
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from flashnorm.errors import FlashNormError
from tests.attacks import whole
from tests.attacks.sandbox import Sandbox
from tests.attacks.targets import QUICK, Attack
from tests.attacks.whole import WHOLE

# That one attack may take of a processor, and by the clock where it waits for something.
PROCESSOR, CLOCK = 30.0, 300.0
ATTACKS: dict[str, tuple[Attack, int]] = {**QUICK, **WHOLE}


class Hang(BaseException):
    """An attack took too long; no handler of errors stops it."""


@dataclass
class Tally:
    """What came of the attacks: how many of each kind, how many were refused, what was found."""

    count: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    findings: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        rows = {
            name: {
                "inputs": self.count[name],
                "refused": self.refused[name],
                "slowest_seconds": round(self.slowest[name], 3),
            }
            for name in sorted(self.count)
        }
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "inputs": self.count.total(),
            "seconds": round(self.seconds, 1),
            "peak_mib": round(most),
            "findings": self.findings,
            "targets": rows,
        }


def drawn(seed: int, attacks: dict[str, tuple[Attack, int]]) -> str:
    """Which attack a seed stands for."""
    names, weights = [*attacks], [weight for _, weight in attacks.values()]
    return Random(f"which {seed}").choices(names, weights)[0]


def attack(seed: int, name: str, box: Sandbox, tally: Tally) -> None:
    """One attack; what it finds goes into the tally."""
    whole.cleared(box)
    start = time.process_time()
    try:
        with bounded():
            ATTACKS[name][0](Random(f"{name} {seed}"), box)
    except FlashNormError as error:
        tally.refused[name] += 1
        found = "" if _said(error) else "an error that cannot be printed"
    except Hang:
        found = "it does not end"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = f"{type(error).__name__} at {_where(error)}"
    else:
        found = ""
    tally.count[name] += 1
    spent = time.process_time() - start
    tally.slowest[name] = max(tally.slowest.get(name, 0.0), spent)
    found = found or _written(box)
    if found:
        tally.findings.setdefault(f"{name}: {found}", []).append(seed)


def _said(error: FlashNormError) -> bool:
    try:
        str(error).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _where(error: BaseException) -> str:
    """The innermost line of flashnorm in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "flashnorm" in Path(f.filename).parts] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""


def _written(box: Sandbox) -> str:
    """What changed beside the target, and what is left beside it."""
    changed = {*box.good.items()} ^ {*box.snapshot().items()}
    return f"written outside: {sorted(k for k, _ in changed)[0]}" if changed else ""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hang in a block that takes longer."""

    def handler(*_: Any) -> None:
        raise Hang

    timers = (
        (signal.ITIMER_REAL, signal.SIGALRM, CLOCK),
        (signal.ITIMER_PROF, signal.SIGPROF, PROCESSOR),
    )
    before = [signal.signal(number, handler) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), old in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, old)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of good folds and bad files."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def run(
    seeds: Iterable[int], box: Sandbox, names: dict[str, tuple[Attack, int]]
) -> Iterator[tuple[int, Tally]]:
    """All attacks of these seeds: each with the tally so far."""
    tally, start = Tally(), time.monotonic()
    with quiet():
        for seed in seeds:
            attack(seed, drawn(seed, names), box, tally)
            tally.seconds = time.monotonic() - start
            yield seed, tally
