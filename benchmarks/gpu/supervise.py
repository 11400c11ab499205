"""The process that watches the one that measures: hands its files on, ends it where it hangs,
starts it again where it dies, and prints the summary last, whatever happened.

It loads nothing but Python, so that it is there at once and cannot be taken down by a device.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from benchmarks.gpu.handoff import (
    BROKEN,
    CRASHED,
    CUT,
    NOW,
    RESULTS,
    SUMMARY,
    USAGE,
    Progress,
    deliver,
)

COMMITTED = Path("benchmarks/results")
EVERY = 15.0  # seconds between two copies
GRACE = 20.0  # seconds that a piece may take beyond the time of its stage
LAST = 10.0  # seconds that the other process has to end when it is asked to
LEAST = 25.0  # seconds that are worth starting it again
SKIPPED = "FLASHNORM_BENCH_SKIPPED"  # why stages and pieces are not tried, for the other process


@dataclass
class Watch:
    """A run as it is seen from outside. `out` is None until the name of the card is known."""

    work: Path
    out: Path | None
    seconds: float
    begun: float = field(default_factory=time.monotonic)
    skipped: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    held: tuple[int, ...] = ()  # the lock, which the measuring process holds as well

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)


def supervise(watch: Watch, arguments: list[str], resume: bool) -> int:
    """Measure, and hand on what is found. Returns the exit code of the run."""
    watch.work.mkdir(parents=True, exist_ok=True)
    with _alone(watch), _stoppable(watch):
        code = _measure(watch, arguments, resume)
    _hand_on(watch, loud=True)
    where = watch.out or watch.work
    print(f"written to {where}; exit code {code}", flush=True)
    summary = watch.work / SUMMARY
    if code != USAGE and summary.exists():
        print(summary.read_text("utf-8"), end="", flush=True)
    return code


def _measure(watch: Watch, arguments: list[str], resume: bool) -> int:
    while True:
        (watch.work / NOW).unlink(missing_ok=True)
        ended, what, why = _watched(watch, _started(watch, arguments, resume))
        if not what:
            return ended
        if watch.stopped:
            return CUT
        if what in watch.skipped or watch.left() < LEAST:
            return CUT
        print(f"{what}: {why}; measuring goes on without it", flush=True)
        watch.skipped[what] = why
        resume = True


def _started(watch: Watch, arguments: list[str], resume: bool) -> subprocess.Popen[bytes]:
    until = f"{time.time() + watch.left():.1f}"
    more = ["--worker", "--until", until, *(["--resume"] * resume)]
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, *more]
    environment = {**os.environ, SKIPPED: json.dumps(watch.skipped), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, pass_fds=watch.held)


def _watched(watch: Watch, child: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """The exit code of the process; where it did not end well, in which piece or stage, and why."""
    copied = time.monotonic()
    while child.poll() is None:
        if watch.stopped:
            _end(child)
        elif over := _overrun(watch.work):
            child.kill()
            child.wait()
            return child.returncode, over.stage, f"stopped, {over.piece} took too long"
        elif time.monotonic() - copied > EVERY:
            _hand_on(watch)
            copied = time.monotonic()
        time.sleep(0.2)
    if child.returncode in (BROKEN, CRASHED) or child.returncode < 0:
        at = Progress.read(watch.work)
        what = at.piece if at else "the beginning"
        return child.returncode, what, f"the process ended with {child.returncode} in it"
    return child.returncode, "", ""


def _overrun(work: Path) -> Progress | None:
    """The piece that is measured for longer than it may be."""
    at = Progress.read(work)
    return at if at and time.time() > at.since + at.seconds + GRACE else None


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(LAST)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _hand_on(watch: Watch, loud: bool = False) -> None:
    watch.out = watch.out or _named_by_card(watch.work)
    for failed in deliver(watch.work, watch.out) if watch.out else ():
        if loud:
            print(f"not copied: {failed}", flush=True)


def _named_by_card(work: Path) -> Path | None:
    try:
        card = json.loads((work / RESULTS).read_text("utf-8"))["runs"][-1]["card"]
    except (OSError, ValueError, LookupError):
        return None
    name = re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia ")).strip("-")
    return COMMITTED / f"gpu-{name}-{date.today()}"


@contextmanager
def _alone(watch: Watch) -> Iterator[None]:
    """No other run in this folder; one that was killed leaves it within a second."""
    with (watch.work / "lock").open("w") as file:
        for attempt in range(11):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 10:
                    raise SystemExit(
                        f"another run is measuring in {watch.work}: wait, or give another --work"
                    ) from None
                time.sleep(0.5)
        watch.held = (file.fileno(),)
        yield


@contextmanager
def _stoppable(watch: Watch) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the measuring process and then this one, with all that was found."""

    def stop(*_: object) -> None:
        watch.stopped = True

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
