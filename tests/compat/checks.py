"""What is relied on of every private name, by its name."""

from __future__ import annotations

from collections.abc import Callable

CHECKS: dict[str, Callable[[], object]] = {}


def checks(*theirs: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def keep(check: Callable[[], object]) -> Callable[[], object]:
        CHECKS.update(dict.fromkeys(theirs, check))
        return check

    return keep
