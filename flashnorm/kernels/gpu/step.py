"""One launch of one kernel: everything that it needs, to be run or to be compiled only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Step(NamedTuple):
    """dependent: it starts before the kernel in front of it has ended, and waits by itself."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the names of the kernel's parameters
    warps: int
    stages: int = 3
    dependent: bool = False

    def options(self) -> dict[str, Any]:
        """What Triton is told beside the arguments."""
        found: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        return {**found, "launch_pdl": True} if self.dependent else found


def execute(steps: Iterable[Step]) -> None:
    for step in steps:
        step.kernel[step.grid](**step.arguments, **step.options())
