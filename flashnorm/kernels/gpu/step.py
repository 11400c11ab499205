"""One launch of one kernel: everything that it needs, to be run or to be compiled only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Step(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the names of the kernel's parameters
    warps: int
    stages: int = 3


def execute(steps: Iterable[Step]) -> None:
    for kernel, grid, arguments, warps, stages in steps:
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)
