"""Work on shards that any process can do: what a job is, and all of them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

from flashnorm.checkpoint.stream import Report
from flashnorm.checkpoint.values import Values

T = TypeVar("T")
Made = TypeVar("Made", covariant=True)
ReportOf = Callable[[str], Report]


class Job(Protocol[Made]):
    """One shard and what is done with it; it can be sent to another machine."""

    @property
    def name(self) -> str:
        """What progress and errors call it."""

    @property
    def nbytes(self) -> int:
        """What it reports in all."""

    def run(self, values: Values, report: Report) -> Made:
        """Do it."""


class Runner(Protocol[T]):
    """Who does the jobs; yields each, when it is done, with its result."""

    def __call__(
        self, jobs: Sequence[Job[T]], values: Values, report_of: ReportOf, /
    ) -> Generator[tuple[Job[T], T], None, None]: ...


def run_here(
    jobs: Sequence[Job[T]], values: Values, report_of: ReportOf
) -> Generator[tuple[Job[T], T], None, None]:
    """Do every job in this process, in order."""
    for job in jobs:
        yield job, job.run(values, report_of(job.name))
