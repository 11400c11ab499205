"""Progress on stderr: a moving line on a terminal, and whole lines for a file or a pipe."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Protocol

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flashnorm.cli.boundary import is_quiet, stderr_console

Report = Callable[[int, int | None, str], None]

# Where stderr is no terminal: seconds until a command says what it does, if it takes that long, the
# same for one that is known to be long, and seconds between two lines.
QUIET, SOON, PATIENCE = 30.0, 1.0, 10.0


@contextmanager
def bytes_bar(first: str) -> Iterator[Report]:
    """A bar of bytes with their speed; `first` is said until the first bytes are done."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(first, *columns) as report:
        yield report


@contextmanager
def steps_bar(first: str) -> Iterator[Report]:
    """A bar of steps, each named while it runs."""
    with _bar(first, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as report:
        yield report


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """A spinner for work of unknown length."""
    with _bar(words, TimeElapsedColumn()):
        yield


class Steps:
    """Names the step that is done now; `paused` while something else is written."""

    def __init__(self, shown: _Shown) -> None:
        self._shown = shown

    def __call__(self, name: str) -> None:
        self._shown(0, None, name)

    def paused(self) -> AbstractContextManager[None]:
        return self._shown.paused()


@contextmanager
def named_steps(first: str) -> Iterator[Steps]:
    """A spinner that names what is done now, where nobody knows how many steps there are.

    Such work is long: without a terminal there is a line for each step as it begins. What stands
    behind " | " in a name is how far the step is.
    """
    with _bar(first, TimeElapsedColumn(), soon=SOON) as report:
        yield Steps(report)


class _Shown(Protocol):
    """A `Report` that can be paused."""

    def __call__(self, done: int, total: int | None, name: str, /) -> None: ...

    def paused(self) -> AbstractContextManager[None]: ...


class _Silent:
    """Under --quiet."""

    def __call__(self, done: int, total: int | None, name: str, /) -> None:
        pass

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Bar:
    """A moving line, which is taken away while it is paused."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self.bar, self.task = bar, task

    def __call__(self, done: int, total: int | None, name: str, /) -> None:
        self.bar.update(self.task, completed=done, total=total, description=name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.bar.stop()
        try:
            yield
        finally:
            self.bar.start()


@contextmanager
def _bar(first: str, *columns: ProgressColumn, soon: float = QUIET) -> Iterator[_Shown]:
    if is_quiet():
        yield _Silent()
        return
    console = stderr_console()
    if not console.is_terminal:
        with _lines(first, soon) as report:
            yield report
        return
    words = TextColumn("{task.description}", markup=False)
    bar = Progress(SpinnerColumn(), words, *columns, console=console, transient=True)
    with bar:
        yield _Bar(bar, bar.add_task(first, total=None))


@contextmanager
def _lines(first: str, soon: float) -> Iterator[_Shown]:
    """Lines for a reader that is no terminal: work that is done within `soon` seconds says nothing.

    Where that is `SOON` every new step is a line as well.
    """
    lines, done = _Lines(first, soon), threading.Event()
    ticker = threading.Thread(target=lines.tick, args=(done,), daemon=True)
    ticker.start()
    try:
        yield lines
    finally:
        done.set()
        ticker.join()


class _Lines:
    """What is done now, written by whoever notices first that it is time for a line."""

    def __init__(self, first: str, soon: float) -> None:
        self.now, self.written, self.every_step = first, "", soon == SOON
        self.start = time.monotonic()
        self.due = self.start + soon
        self.out, self.lock = sys.stderr, threading.Lock()

    def __call__(self, done: int, total: int | None, name: str, /) -> None:
        share = f" | {done / total:.0%}" if total else ""
        self.now = name + share
        late = time.monotonic() >= self.start + SOON
        self._write(self.every_step and late and _step(self.now) != _step(self.written))

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    def tick(self, done: threading.Event) -> None:
        while not done.wait(max(0.05, self.due - time.monotonic())):
            self._write()

    def _write(self, at_once: bool = False) -> None:
        with self.lock:
            if at_once or time.monotonic() >= self.due:
                with suppress(OSError, ValueError):  # nobody reads it any more
                    self.out.write(f"{time.monotonic() - self.start:4.0f} s  {self.now}\n")
                    self.out.flush()
                self.written, self.due = self.now, time.monotonic() + PATIENCE


def _step(name: str) -> str:
    return name.partition(" | ")[0]
