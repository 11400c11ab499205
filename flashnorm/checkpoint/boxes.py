"""Elements of a tensor by the places that they come from, moved about without any values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Box:
    """Elements of a tensor of shape `sizes`, arranged in the shape `shape`; none is taken twice.

    `coordinates` has one tensor per axis of the tensor, shaped like the box, with stride 0 along
    every axis that it does not vary along: where on that axis each element comes from. Boxes are
    told apart by identity: those that are made in the same way are one and the same.
    """

    sizes: Shape
    shape: Shape
    coordinates: tuple[Tensor, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def index(self) -> tuple[Tensor, ...]:
        """The box as an index into the tensor: small tensors that broadcast to its shape."""
        return tuple(compact(coordinate) for coordinate in self.coordinates)

    @property
    def is_plain(self) -> bool:
        """Whether the box is the tensor as it lies."""
        if self.shape != self.sizes:
            return False
        return all(runs_along(c, axis) for axis, c in enumerate(self.index))

    @cached_property
    def lies_in_order(self) -> bool:
        """Whether the box is the whole tensor in the order of its memory, axes of one aside."""
        ours = [axis for axis, size in enumerate(self.shape) if size != 1]
        theirs = [axis for axis, size in enumerate(self.sizes) if size != 1]
        if [self.shape[axis] for axis in ours] != [self.sizes[axis] for axis in theirs]:
            return False
        index = self.index
        return all(runs_along(index[b], a) for a, b in zip(ours, theirs, strict=True))

    def along(self, first: int, count: int) -> Box:
        """What lies at `count` positions from `first` on of its first axis."""
        return narrowed(self, 0, first, count)

    def moved(self, change: Callable[[Tensor], Tensor]) -> Box:
        shape = tuple(change(torch.empty(()).expand(self.shape)).shape)
        return Box(self.sizes, shape, tuple(change(c) for c in self.coordinates))


@lru_cache(maxsize=4096)
def box_of(sizes: Shape) -> Box:
    """All of a tensor as it lies."""
    if 0 in sizes:  # the other axes may be of any length
        return Box(sizes, sizes, (torch.empty(sizes, dtype=torch.int64),) * len(sizes))
    coordinates = []
    for axis, size in enumerate(sizes):
        lead = [1] * len(sizes)
        lead[axis] = size
        coordinates.append(torch.arange(size).view(lead).expand(sizes))
    return Box(sizes, sizes, tuple(coordinates))


@lru_cache(maxsize=4096)
def permuted(box: Box, order: Shape) -> Box:
    return box.moved(lambda c: c.permute(order))


@lru_cache(maxsize=4096)
def unsqueezed(box: Box, axis: int) -> Box:
    return box.moved(lambda c: c.unsqueeze(axis))


@lru_cache(maxsize=4096)
def selected(box: Box, axis: int) -> Box:
    """Without an axis of size one."""
    return box.moved(lambda c: c.select(axis, 0))


@lru_cache(maxsize=4096)
def narrowed(box: Box, axis: int, first: int, length: int) -> Box:
    return box.moved(lambda c: c.narrow(axis, first, length))


@lru_cache(maxsize=4096)
def viewed(box: Box, shape: Shape) -> Box:
    return box.moved(lambda c: reshaped(c, shape))


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
