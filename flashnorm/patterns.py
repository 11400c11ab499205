"""Module paths in short: those that differ in numbers only are one, `blocks.{0-3,7}.norm`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

# A number that is a whole component of a module path: `blocks.12.norm`, or `0.norm`.
_NUMBER = re.compile(r"(?<=[A-Za-z_]\.)\d+(?=[.' ,;)]|$)|^\d+(?=\.\D)")


def skeleton(text: str) -> str:
    """Equal for texts that differ in path numbers only."""
    return _NUMBER.sub("#", text)


def merged(texts: Sequence[str]) -> str:
    """Texts of one skeleton as one: `blocks.{0-3,7}.norm`."""
    columns = [set(map(int, column)) for column in zip(*map(_NUMBER.findall, texts), strict=True)]
    slots = iter(columns)

    def fill(match: re.Match[str]) -> str:
        values = next(slots)
        return match[0] if len(values) == 1 else f"{{{ranges(values)}}}"

    return _NUMBER.sub(fill, texts[0])


def ranges(values: Iterable[int]) -> str:
    """Whole numbers in short: 0, 1, 2, 5 as `0-2,5`."""
    runs: list[tuple[int, int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def relative(name: str, path: str) -> str:
    """`name` without the block that holds the module `path` too."""
    parts, block = name.split("."), path.split(".")[:-1]
    shared = 0
    while shared < min(len(parts) - 1, len(block)) and parts[shared] == block[shared]:
        shared += 1
    return ".".join(parts[shared:])


def block(path: str) -> str:
    """The layer that a module is in, `blocks.3` of `blocks.3.att.norm`; else its parent."""
    parts = path.split(".")[:-1]
    last = max((at for at, part in enumerate(parts) if part.isdecimal()), default=None)
    return ".".join(parts if last is None else parts[: last + 1])


def families(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names by parent module, each family with its size: `blocks.{0-3}.att: q k v`, 12."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[skeleton(name)].append(name)
    parents: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for group in alike.values():
        parent, _, leaf = merged(group).rpartition(".")
        parents[parent].append((leaf, len(group)))
    return [
        (_family(parent, [leaf for leaf, _ in leaves]), sum(size for _, size in leaves))
        for parent, leaves in parents.items()
    ]


def joined(names: Iterable[str]) -> str:
    """All families in one line: `att: q k v, mlp.up`."""
    return ", ".join(text for text, _ in families(names))


def _family(parent: str, leaves: Sequence[str]) -> str:
    if not parent:
        return ", ".join(leaves)
    return f"{parent}.{leaves[0]}" if len(leaves) == 1 else f"{parent}: {' '.join(leaves)}"
