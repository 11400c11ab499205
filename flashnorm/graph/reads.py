"""How much of a parameter was read: what was not may be read by another input, in another way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from flashnorm.graph.gain_index import without_repeats
from flashnorm.graph.params import ParamView


def is_whole(views: Sequence[ParamView]) -> bool:
    """Whether these readings of one parameter reach every element of it.

    Readings that are all of it but along one axis are put together; others count by themselves.
    """
    along: dict[int, set[int]] = defaultdict(set)
    for view in views:
        positions = _positions(view)
        partial = [axis for axis, found in enumerate(positions) if found is not None]
        if not partial:
            return True
        if len(partial) == 1:
            axis = partial[0]
            along[axis] |= positions[axis] or set()
            if len(along[axis]) == view.sizes[axis]:
                return True
    return False


def row_of_bank(views: Sequence[ParamView]) -> tuple[int, ...]:
    """The shape of a row where every reading is of one row, and not all were read; else ()."""
    if not views or is_whole(views):
        return ()
    rows = []
    for view in views:
        positions = _positions(view)
        picked = [axis for axis, found in enumerate(positions) if found is not None]
        if any(len(positions[axis] or ()) > 1 for axis in picked):
            return ()
        rows.append(tuple(size for axis, size in enumerate(view.sizes) if axis not in picked))
    return max(rows, key=len)


def _positions(view: ParamView) -> list[set[int] | None]:
    """Per axis of the parameter the positions that a view shows; None where it shows all."""
    found: list[set[int] | None] = []
    shown, elements = 1, _elements(view)
    for axis, (size, coordinate) in enumerate(zip(view.sizes, view.coordinates, strict=True)):
        if coordinate is None or axis in view.picked:
            found.append(None)  # any of them, chosen by a value
            continue
        positions = without_repeats(coordinate).unique()
        shown *= len(positions)
        found.append(None if len(positions) == size else set(positions.tolist()))
    if shown > elements:
        return [set() for _ in found]  # a diagonal and its like: not every combination is there
    return found


def _elements(view: ParamView) -> int:
    """How many elements of a view are not repetitions of others."""
    known = [c for c in view.coordinates if c is not None]
    sizes = [without_repeats(c).shape for c in known]
    return int(torch.Size(max(per_axis) for per_axis in zip(*sizes, strict=True)).numel())
