"""The picture of a model: its blocks from top to bottom, alike ones drawn once with their count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from flashnorm.patterns import block, merged

Item = TypeVar("Item")
LONGEST_CYCLE = 8  # blocks that repeat together, such as three of one kind and one of another
ROOT = "(the model itself)"
TOP = "(top level)"

Tip = tuple[tuple[str, str], ...]  # terms and what is said of them


@dataclass(frozen=True)
class Chip:
    """A reader of a norm. `marks` are the short signs of what it takes, `state` its look."""

    name: str
    state: str
    marks: tuple[str, ...] = ()
    tip: Tip = ()


@dataclass(frozen=True)
class Badge:
    """Something else that happens to a norm."""

    words: str
    state: str


@dataclass(frozen=True)
class Row:
    """A module, or alike ones, of a block. `state` is its shape and colour, `label` says it."""

    name: str
    count: int
    state: str
    label: str
    meta: str = ""
    badges: tuple[Badge, ...] = ()
    chips: tuple[Chip, ...] = ()
    words: str = ""
    tip: Tip = ()


@dataclass(frozen=True)
class Group:
    """Blocks that are alike."""

    name: str
    count: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Cycle:
    """Groups one after the other; all of it `repeats` times."""

    groups: tuple[Group, ...]
    repeats: int


@dataclass(frozen=True)
class Block:
    """What lies in one block: the modules whose paths begin with `path`, as they follow."""

    path: str
    items: tuple[object, ...]


def blocks(items: Iterable[Item], path: Callable[[Item], str]) -> list[Block]:
    """Items that follow each other in one block, together."""
    return [
        Block(key, tuple(found)) for key, found in groupby(items, lambda item: block(path(item)))
    ]


def cycles(
    found: Sequence[Block],
    likeness: Callable[[Block], object],
    rows: Callable[[list[Block]], list[Row]],
) -> list[Cycle]:
    """Consecutive blocks of one likeness as one group; what repeats after a few as one cycle."""
    likenesses = [likeness(each) for each in found]
    done, at = [], 0
    while at < len(found):
        length, repeats = _repeated(likenesses[at:])
        part = found[at : at + length * repeats]
        # Neighbours inside of a cycle may be alike too.
        inside = groupby(range(length), lambda place: likenesses[at + place])  # noqa: B023
        groups = []
        for _, places in inside:
            chosen = {*places}
            alike = [each for place, each in enumerate(part) if place % length in chosen]
            name = merged([each.path for each in alike]) or TOP
            groups.append(Group(name, len(alike), tuple(rows(alike))))
        done.append(Cycle(tuple(groups), repeats if len(groups) > 1 else 1))
        at += length * repeats
    return done


def _repeated(likenesses: Sequence[object]) -> tuple[int, int]:
    """How many blocks repeat from here on, and how often: what covers most, the shortest first."""
    best, covered = (1, 1), 1
    for length in range(1, min(LONGEST_CYCLE, len(likenesses)) + 1):
        repeats = 1
        while list(likenesses[repeats * length : (repeats + 1) * length]) == list(
            likenesses[:length]
        ):
            repeats += 1
        if repeats > 1 and length * repeats > covered:
            best, covered = (length, repeats), length * repeats
    return best


def inside(path: str, block_path: str) -> str:
    """A module's path without its block's."""
    return path.removeprefix(f"{block_path}.") if block_path else path
