"""Where the values of a model's parameters lie in the tensors of its checkpoint.

A `ProvenanceTensor` has a shape and no values: for each of its elements it knows the tensor of the
checkpoint and the place in it that the element comes from. Operations that only move values (cut,
join, stack, transpose, reshape) move these places; any other raises NotAMove. So a loader that is
given such tensors tells exactly what it would do with the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashnorm.checkpoint.boxes import (
    Box,
    Shape,
    box_of,
    narrowed,
    permuted,
    selected,
    unsqueezed,
    viewed,
)
from flashnorm.compat.torch_names import make_wrapper_subclass, no_torch_function, tree_map_only


class NotAMove(RuntimeError):
    """The operation makes new values, or moves them in a way that cannot be followed."""


@dataclass(frozen=True)
class TensorSlice:
    """A box of the tensor `tensor` of the checkpoint, which lies in a value from `start` on."""

    tensor: str
    start: Shape
    box: Box

    @property
    def place(self) -> tuple[slice, ...]:
        """Where the box lies, as an index into the value."""
        return tuple(
            slice(first, first + n) for first, n in zip(self.start, self.box.shape, strict=True)
        )


@dataclass(frozen=True)
class Provenance:
    """A value of the model and the boxes that make it up, which leave nothing of it out."""

    shape: Shape
    slices: tuple[TensorSlice, ...]

    def same(self, other: Provenance) -> bool:
        """Whether both take the same elements to the same places."""
        return (self.shape, len(self.slices)) == (other.shape, len(other.slices)) and all(
            (a.tensor, a.start, a.box) == (b.tensor, b.start, b.box)
            for a, b in zip(self.slices, other.slices, strict=True)
        )

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that it is made of, once each."""
        return tuple(dict.fromkeys(part.tensor for part in self.slices))


def whole_tensor(tensor: str, shape: Sequence[int]) -> Provenance:
    """A value that is one tensor of the checkpoint."""
    sizes = tuple(shape)
    return Provenance(sizes, (TensorSlice(tensor, (0,) * len(sizes), box_of(sizes)),))


class ProvenanceTensor(Tensor):
    """A tensor of `TensorSlice`s in place of values."""

    slices: tuple[TensorSlice, ...]

    @staticmethod
    def __new__(cls, shape: Sequence[int], slices: Sequence[TensorSlice]) -> ProvenanceTensor:
        made = make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32)
        made.slices = tuple(slices)
        return made

    @staticmethod
    def of(tensor: str, shape: Sequence[int]) -> ProvenanceTensor:
        """All of one tensor of the checkpoint."""
        return ProvenanceTensor(shape, whole_tensor(tensor, shape).slices)

    def provenance(self) -> Provenance:
        return Provenance(tuple(self.shape), self.slices)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ProvenanceTensor({list(self.shape)}, {len(self.slices)} slices)"

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        rule = _RULES.get(func.overloadpacket.__name__)
        if rule is None:
            raise NotAMove(f"{func} is no pure move of values")
        if rule is _same:
            return _same(*args)
        wanted = func(*_metas(args), **_metas(kwargs or {}))  # raises where torch would
        moved = rule(*args, **(kwargs or {}))
        if [v.shape for v in _listed(moved)] != [v.shape for v in _listed(wanted)]:
            raise NotAMove(f"{func} moves values in a way that is not followed")
        return moved


def _metas(values: Any) -> Any:
    """The same with tensors that have shapes only."""
    return tree_map_only(Tensor, lambda v: torch.empty(v.shape, device="meta"), values)


def _listed(values: Any) -> Sequence[Tensor]:
    return values if isinstance(values, (list, tuple)) else [values]


def _same(value: ProvenanceTensor, *args: Any) -> ProvenanceTensor:
    """A copy, on whatever device and in whatever dtype."""
    return ProvenanceTensor(value.shape, value.slices)


def _permute(value: ProvenanceTensor, order: Sequence[int]) -> ProvenanceTensor:
    axes = tuple(axis % value.ndim for axis in order)
    return ProvenanceTensor(
        _picked(value.shape, axes),
        [
            TensorSlice(p.tensor, _picked(p.start, axes), permuted(p.box, axes))
            for p in value.slices
        ],
    )


def _picked(values: Sequence[int], order: Shape) -> Shape:
    return tuple(values[axis] for axis in order)


def _transpose(value: ProvenanceTensor, first: int = 0, second: int = 1) -> ProvenanceTensor:
    order = list(range(value.ndim))
    if order:
        order[first], order[second] = order[second], order[first]
    return _permute(value, order)


def _unsqueeze(value: ProvenanceTensor, axis: int) -> ProvenanceTensor:
    axis %= value.ndim + 1
    return ProvenanceTensor(
        _with(value.shape, axis, 1, drop=0),
        [
            TensorSlice(p.tensor, _with(p.start, axis, 0, drop=0), unsqueezed(p.box, axis))
            for p in value.slices
        ],
    )


def _with(values: Sequence[int], axis: int, *new: int, drop: int = 1) -> Shape:
    """The values with that of one axis replaced; with `drop` 0, before it."""
    return (*values[:axis], *new, *values[axis + drop :])


def _squeeze(value: ProvenanceTensor, axis: int) -> ProvenanceTensor:
    axis %= value.ndim
    return _select(value, axis, 0) if value.shape[axis] == 1 else _same(value)


def _select(value: ProvenanceTensor, axis: int, index: int) -> ProvenanceTensor:
    axis %= value.ndim
    cut = _narrow(value, axis, index % value.shape[axis], 1)
    return ProvenanceTensor(
        _with(value.shape, axis),
        [TensorSlice(p.tensor, _with(p.start, axis), selected(p.box, axis)) for p in cut.slices],
    )


def _slice(
    value: ProvenanceTensor,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> ProvenanceTensor:
    if step != 1:
        raise NotAMove("a slice with a step is not followed")
    first, stop, _ = slice(start, end).indices(value.shape[axis])
    return _narrow(value, axis % value.ndim, first, max(0, stop - first))


def _narrow(value: ProvenanceTensor, axis: int, first: int, length: int) -> ProvenanceTensor:
    slices = []
    for p in value.slices:
        low = max(p.start[axis], first)
        count = min(p.start[axis] + p.box.shape[axis], first + length) - low
        if count > 0:
            box = narrowed(p.box, axis, low - p.start[axis], count)
            slices.append(TensorSlice(p.tensor, _with(p.start, axis, low - first), box))
    return ProvenanceTensor(_with(value.shape, axis, length), slices)


def _split_sizes(
    value: ProvenanceTensor, sizes: Sequence[int], axis: int = 0
) -> list[ProvenanceTensor]:
    first, pieces = 0, []
    for size in sizes:
        pieces.append(_narrow(value, axis % value.ndim, first, size))
        first += size
    return pieces


def _split(value: ProvenanceTensor, size: int, axis: int = 0) -> list[ProvenanceTensor]:
    total = value.shape[axis]
    return _split_sizes(value, [min(size, total - i) for i in range(0, total, size)], axis)


def _unbind(value: ProvenanceTensor, axis: int = 0) -> list[ProvenanceTensor]:
    return [_select(value, axis, i) for i in range(value.shape[axis])]


def _cat(values: Sequence[ProvenanceTensor], axis: int = 0) -> ProvenanceTensor:
    if not all(isinstance(value, ProvenanceTensor) for value in values):
        raise NotAMove("values of the checkpoint are joined with others")
    axis %= values[0].ndim
    slices: list[TensorSlice] = []
    position = 0
    for value in values:
        for part in value.slices:
            start = _with(part.start, axis, part.start[axis] + position)
            slices.append(TensorSlice(part.tensor, start, part.box))
        position += value.shape[axis]
    return ProvenanceTensor(_with(values[0].shape, axis, position), slices)


def _stack(values: Sequence[ProvenanceTensor], axis: int = 0) -> ProvenanceTensor:
    axis %= values[0].ndim + 1
    return _cat([_unsqueeze(value, axis) for value in values], axis)


def _view(value: ProvenanceTensor, shape: Sequence[int]) -> ProvenanceTensor:
    shape = _known(shape, value.numel())
    if value.numel() == 0:
        return ProvenanceTensor(shape, ())
    if shape == tuple(value.shape):
        return _same(value)
    if len(value.slices) != 1 or value.slices[0].box.shape != tuple(value.shape):
        raise NotAMove("values of several tensors are reshaped together")
    part = value.slices[0]
    return ProvenanceTensor(
        shape, [TensorSlice(part.tensor, (0,) * len(shape), viewed(part.box, shape))]
    )


def _known(shape: Sequence[int], numel: int) -> Shape:
    rest = math.prod(size for size in shape if size != -1)
    return tuple(numel // max(1, rest) if size == -1 else size for size in shape)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("alias", "detach", "clone", "_to_copy", "contiguous"), _same),
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
    "slice": _slice,
    "split": _split,
    "split_with_sizes": _split_sizes,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
}
