"""Rows of what was found, and how they are made: a check that fails is a row as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "note", "broken"]


@dataclass(frozen=True)
class Row:
    """One thing that was looked at: what was found, and if need be how to mend it.

    state: "ok"; "missing", which nothing of what is installed needs; "note", which is worth
    knowing; "broken", which the package needs.
    """

    group: str
    name: str
    found: str
    state: State = "ok"
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """Makes rows of a group. Where it raises, that is a row: broken where it is `needed`."""

    group: str
    name: str
    rows: Callable[[], Iterable[Row]]
    needed: bool = False


def examine() -> Iterator[Row]:
    """Every row, as soon as it is known. A check that raises ends none of the others."""
    from flashnorm.doctor import kernels, machine, settings, software

    for check in (*machine.CHECKS, *kernels.CHECKS, *software.CHECKS, *settings.CHECKS):
        yield from _rows(check)


def _rows(check: Check) -> Iterator[Row]:
    try:
        yield from check.rows()
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")
        found = f"cannot be told: {type(error).__name__}{': ' if said else ''}{said}"
        yield Row(check.group, check.name, found, "broken" if check.needed else "note")
