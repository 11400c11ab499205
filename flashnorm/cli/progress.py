"""Progress on stderr, where a person is looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flashnorm.cli.boundary import stderr_console

Report = Callable[[int, int | None, str], None]


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


@contextmanager
def named_steps(first: str) -> Iterator[Callable[[str], None]]:
    """A spinner that names what is done now, where nobody knows how many steps there are."""
    with _bar(first, TimeElapsedColumn()) as report:
        yield lambda name: report(0, None, name)


@contextmanager
def _bar(first: str, *columns: ProgressColumn) -> Iterator[Report]:
    console = stderr_console()
    words = TextColumn("{task.description}", markup=False)
    bar = Progress(
        SpinnerColumn(), words, *columns, console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(first, total=None)
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name
        )
