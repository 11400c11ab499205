"""Where the values of a model's parameters lie in the tensors of its checkpoint.

A `Located` tensor has a shape and no values: for each of its elements it knows the tensor of the
checkpoint and the place in it that the element comes from. Operations that only move values (cut,
join, stack, transpose, reshape) move these places; any other raises NotAMove. So a loader that is
given such tensors tells exactly what it would do with the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


class NotAMove(RuntimeError):
    """The operation makes new values, or moves them in a way that cannot be followed."""


@dataclass(frozen=True)
class Part:
    """A box of a value, from `start` on and of shape `shape`, that is filled from one tensor.

    `tensor` of shape `sizes` lies in the checkpoint. `coordinates` has one tensor per axis of it,
    shaped like the box, with stride 0 along every axis that it does not vary along: where on that
    axis each element of the box comes from. No element is taken twice.
    """

    tensor: str
    sizes: Shape
    start: Shape
    shape: Shape
    coordinates: tuple[Tensor, ...]

    @staticmethod
    def of(tensor: str, shape: Sequence[int]) -> Part:
        sizes = tuple(shape)
        coordinates = []
        for axis, size in enumerate(sizes):
            lead = [1] * len(sizes)
            lead[axis] = size
            coordinates.append(torch.arange(size).view(lead).expand(sizes))
        return Part(tensor, sizes, (0,) * len(sizes), sizes, tuple(coordinates))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether the box is the tensor as it lies."""
        if self.shape != self.sizes:
            return False
        return all(runs_along(c, axis) for axis, c in enumerate(self.index))

    @property
    def box(self) -> tuple[slice, ...]:
        """The box as an index into the value."""
        return tuple(
            slice(first, first + n) for first, n in zip(self.start, self.shape, strict=True)
        )

    @property
    def index(self) -> tuple[Tensor, ...]:
        """The box as an index into the tensor: small tensors that broadcast to its shape."""
        return tuple(compact(coordinate) for coordinate in self.coordinates)

    def moved(self, start: Sequence[int], change: Callable[[Tensor], Tensor]) -> Part:
        coordinates = tuple(change(coordinate) for coordinate in self.coordinates)
        shape = tuple(change(torch.empty(()).expand(self.shape)).shape)
        return Part(self.tensor, self.sizes, tuple(start), shape, coordinates)


@dataclass(frozen=True)
class Whole:
    """A value of the model and the boxes that make it up, which leave nothing of it out."""

    shape: Shape
    parts: tuple[Part, ...]

    def same(self, other: Whole) -> bool:
        """Whether both take the same elements to the same places."""
        return (self.shape, len(self.parts)) == (other.shape, len(other.parts)) and all(
            (a.tensor, a.start, a.shape) == (b.tensor, b.start, b.shape)
            and all(torch.equal(x, y) for x, y in zip(a.index, b.index, strict=True))
            for a, b in zip(self.parts, other.parts, strict=True)
        )

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that it is made of, once each."""
        return tuple(dict.fromkeys(part.tensor for part in self.parts))


def compact(coordinate: Tensor) -> Tensor:
    """The coordinate with every axis that it does not vary along cut to one position."""
    for axis, (size, stride) in enumerate(zip(coordinate.shape, coordinate.stride(), strict=True)):
        if stride == 0 and size > 1:
            coordinate = coordinate.narrow(axis, 0, 1)
    return coordinate


def runs_along(coordinate: Tensor, axis: int) -> bool:
    """Whether a compact coordinate counts 0, 1, 2, … along `axis` and along no other."""
    others = [size for i, size in enumerate(coordinate.shape) if i != axis]
    flat = coordinate.reshape(-1)
    return math.prod(others) == 1 and torch.equal(flat, torch.arange(len(flat)))


class Located(Tensor):
    """A tensor of `Part`s in place of values."""

    parts: tuple[Part, ...]

    @staticmethod
    def __new__(cls, shape: Sequence[int], parts: Sequence[Part]) -> Located:
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32)
        made.parts = tuple(parts)
        return made

    @staticmethod
    def of(tensor: str, shape: Sequence[int]) -> Located:
        """All of one tensor of the checkpoint."""
        return Located(shape, (Part.of(tensor, shape),))

    def whole(self) -> Whole:
        return Whole(tuple(self.shape), self.parts)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Located({list(self.shape)}, {len(self.parts)} parts)"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        rule = _RULES.get(func.overloadpacket.__name__)
        if rule is None:
            raise NotAMove(f"{func} is no pure move of values")
        return rule(*args, **(kwargs or {}))


def _same(value: Located, *args: Any, **kwargs: Any) -> Located:
    return Located(value.shape, value.parts)


def _permute(value: Located, order: Sequence[int]) -> Located:
    order = [axis % value.ndim for axis in order]
    parts = [
        p.moved([p.start[axis] for axis in order], lambda c: c.permute(order)) for p in value.parts
    ]
    return Located([value.shape[axis] for axis in order], parts)


def _transpose(value: Located, first: int = 0, second: int = 1) -> Located:
    order = list(range(value.ndim))
    if order:
        order[first], order[second] = order[second], order[first]
    return _permute(value, order)


def _unsqueeze(value: Located, axis: int) -> Located:
    axis %= value.ndim + 1
    parts = [
        p.moved([*p.start[:axis], 0, *p.start[axis:]], lambda c: c.unsqueeze(axis))
        for p in value.parts
    ]
    return Located([*value.shape[:axis], 1, *value.shape[axis:]], parts)


def _squeeze(value: Located, axis: int) -> Located:
    axis %= value.ndim
    return _select(value, axis, 0) if value.shape[axis] == 1 else _same(value)


def _select(value: Located, axis: int, index: int) -> Located:
    axis %= value.ndim
    cut = _narrow(value, axis, index % value.shape[axis], 1)
    parts = [
        p.moved([*p.start[:axis], *p.start[axis + 1 :]], lambda c: c.select(axis, 0))
        for p in cut.parts
    ]
    return Located([*value.shape[:axis], *value.shape[axis + 1 :]], parts)


def _slice(
    value: Located, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Located:
    if step != 1:
        raise NotAMove("a slice with a step is not followed")
    first, stop, _ = slice(start, end).indices(value.shape[axis])
    return _narrow(value, axis % value.ndim, first, max(0, stop - first))


def _narrow(value: Located, axis: int, first: int, length: int) -> Located:
    parts = []
    for part in value.parts:
        low = max(part.start[axis], first)
        count = min(part.start[axis] + part.shape[axis], first + length) - low
        if count > 0:
            start = [*part.start[:axis], low - first, *part.start[axis + 1 :]]
            cut = partial(torch.narrow, dim=axis, start=low - part.start[axis], length=count)
            parts.append(part.moved(start, cut))
    return Located([*value.shape[:axis], length, *value.shape[axis + 1 :]], parts)


def _split_sizes(value: Located, sizes: Sequence[int], axis: int = 0) -> list[Located]:
    first, pieces = 0, []
    for size in sizes:
        pieces.append(_narrow(value, axis % value.ndim, first, size))
        first += size
    return pieces


def _split(value: Located, size: int, axis: int = 0) -> list[Located]:
    total = value.shape[axis]
    return _split_sizes(value, [min(size, total - i) for i in range(0, total, size)], axis)


def _unbind(value: Located, axis: int = 0) -> list[Located]:
    return [_select(value, axis, i) for i in range(value.shape[axis])]


def _cat(values: Sequence[Located], axis: int = 0) -> Located:
    if not all(isinstance(value, Located) for value in values):
        raise NotAMove("values of the checkpoint are joined with others")
    axis %= values[0].ndim
    parts: list[Part] = []
    position = 0
    for value in values:
        for part in value.parts:
            start = [*part.start[:axis], part.start[axis] + position, *part.start[axis + 1 :]]
            parts.append(replace(part, start=tuple(start)))
        position += value.shape[axis]
    shape = list(values[0].shape)
    return Located([*shape[:axis], position, *shape[axis + 1 :]], parts)


def _stack(values: Sequence[Located], axis: int = 0) -> Located:
    axis %= values[0].ndim + 1
    return _cat([_unsqueeze(value, axis) for value in values], axis)


def _view(value: Located, shape: Sequence[int]) -> Located:
    shape = _known(shape, value.numel())
    if value.numel() == 0:
        return Located(shape, ())
    if len(value.parts) != 1 or value.parts[0].shape != tuple(value.shape):
        if tuple(shape) == tuple(value.shape):
            return _same(value)
        raise NotAMove("values of several tensors are reshaped together")
    part = value.parts[0]
    return Located(shape, (part.moved([0] * len(shape), lambda c: reshaped(c, shape)),))


def _known(shape: Sequence[int], numel: int) -> list[int]:
    rest = math.prod(size for size in shape if size != -1)
    return [numel // max(1, rest) if size == -1 else size for size in shape]


def reshaped(coordinate: Tensor, shape: Sequence[int]) -> Tensor:
    """`coordinate.reshape(shape)` that keeps stride 0 along the axes that it does not vary along.

    Axes are cut into the smallest groups that become each other; only those that vary are copied.
    """
    before, after, keep = [], [], [slice(None)] * coordinate.ndim
    for olds, news in _groups(tuple(coordinate.shape), tuple(shape)):
        constant = all(coordinate.stride(i) == 0 or coordinate.shape[i] == 1 for i in olds)
        for i in olds:
            keep[i] = slice(0, 1) if constant else slice(None)
        before += [1 if constant else coordinate.shape[i] for i in olds]
        after += [1 if constant else shape[i] for i in news]
    return coordinate[tuple(keep)].reshape(after).expand(tuple(shape))


def _groups(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """The axes of two shapes with the same number of elements in groups of equal size."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, second, left, right = i, j, 1, 1
        while (first == i and second == j) or left != right:
            if (left <= right and i < len(old)) or j == len(new):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((range(first, i), range(second, j)))
    return groups


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
