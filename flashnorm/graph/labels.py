"""Labels: which element of which gain every element of a tensor carries as a factor.

A label tensor has the shape of the value it describes. NONE means no gain, FREE that the element
is zero and so carries any gain; a positive number names one gain element. Labels that do not vary
along an axis have stride 0 there, so most of them cost nothing, and the model's own view operations
run on them unchanged: a chunk, a transpose or a concatenation of features moves the labels as it
moves the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NONE = 0
FREE = -1


class Conflict(Exception):
    """Two labels that one element would have to carry at once."""


def filled(shape: Sequence[int], label: int) -> Tensor:
    return torch.tensor(label).expand(tuple(shape))


def varies(label: Tensor, dim: int) -> bool:
    """Whether the label differs anywhere along `dim`."""
    if not label.ndim or label.shape[dim] <= 1 or label.stride(dim) == 0:
        return False
    small = without_repeats(label)
    return bool((small != small.narrow(dim, 0, 1)).any())


def without_repeats(label: Tensor) -> Tensor:
    """The label with every axis of stride 0 cut to one position."""
    for dim, (size, stride) in enumerate(zip(label.shape, label.stride(), strict=True)):
        if stride == 0 and size > 1:
            label = label.narrow(dim, 0, 1)
    return label


def unify(first: Tensor, second: Tensor) -> Tensor:
    """The label of a sum: equal labels stay, FREE gives way, anything else is a Conflict."""
    first, second = torch.broadcast_tensors(first, second)
    if first.data_ptr() == second.data_ptr() and first.stride() == second.stride():
        return first
    if bool(((first != second) & (first != FREE) & (second != FREE)).any()):
        raise Conflict
    return (
        first
        if bool((without_repeats(first) != FREE).all())
        else torch.where(first == FREE, second, first)
    )


def along(label: Tensor, dim: int) -> Tensor:
    """The labels along `dim`, [size]. Raises Conflict where they also vary along another axis."""
    dim %= label.ndim
    for other in range(label.ndim):
        if other != dim and varies(label, other):
            raise Conflict
    index = [0] * label.ndim
    vector = label
    for other in reversed(range(label.ndim)):
        if other != dim:
            vector = vector.select(other, index[other])
    return vector


def without(label: Tensor, dims: Sequence[int]) -> Tensor:
    """The label with `dims` removed. Raises Conflict where it varies along one of them."""
    dims = sorted({d % label.ndim for d in dims}, reverse=True) if label.ndim else []
    for dim in dims:
        if varies(label, dim):
            raise Conflict
    for dim in dims:
        label = label.select(dim, 0) if label.shape[dim] else label.sum(dim)
    return label


def taken(label: Tensor, dim: int, index_shape: Sequence[int]) -> Tensor:
    """The label after rows along `dim` were picked by an index of unknown content."""
    rest = without(label, [dim])
    dim %= label.ndim
    for _ in index_shape:
        rest = rest.unsqueeze(dim)
    shape = (*label.shape[:dim], *index_shape, *label.shape[dim + 1 :])
    return rest.expand(shape)
