"""Gain indices: which element of which gain every element of a tensor carries as a factor.

The gain index of a value is a tensor of its shape. NONE means no gain, FREE that the element is
zero and so carries any gain; a positive number names one gain element. A gain index that does not
vary along an axis has stride 0 there, so most of them cost nothing, and the model's own view
operations run on it unchanged: a chunk, a transpose or a concatenation of features moves the gain
index as it moves the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NONE = 0
FREE = -1


class Conflict(Exception):
    """Two gain elements that one element would have to carry at once."""


def filled(shape: Sequence[int], gain_index: int) -> Tensor:
    return torch.tensor(gain_index).expand(tuple(shape))


def varies(gain_index: Tensor, dim: int) -> bool:
    """Whether the gain index differs along `dim`."""
    if not gain_index.ndim or gain_index.shape[dim] <= 1 or gain_index.stride(dim) == 0:
        return False
    small = without_repeats(gain_index)
    return bool((small != small.narrow(dim, 0, 1)).any())


def without_repeats(gain_index: Tensor) -> Tensor:
    """The gain index with every axis of stride 0 cut to one position."""
    for dim, (size, stride) in enumerate(zip(gain_index.shape, gain_index.stride(), strict=True)):
        if stride == 0 and size > 1:
            gain_index = gain_index.narrow(dim, 0, 1)
    return gain_index


def unify(first: Tensor, second: Tensor) -> Tensor:
    """The gain index of a sum: equal ones stay, FREE gives way, all else is a Conflict."""
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


def along(gain_index: Tensor, dim: int) -> Tensor:
    """The gain index along `dim`, [size]. Raises Conflict where it varies along another axis."""
    dim %= gain_index.ndim
    for other in range(gain_index.ndim):
        if other != dim and varies(gain_index, other):
            raise Conflict
    index = [0] * gain_index.ndim
    vector = gain_index
    for other in reversed(range(gain_index.ndim)):
        if other != dim:
            vector = vector.select(other, index[other])
    return vector


def without(gain_index: Tensor, dims: Sequence[int]) -> Tensor:
    """The gain index with `dims` removed. Raises Conflict where it varies along one of them."""
    dims = sorted({d % gain_index.ndim for d in dims}, reverse=True) if gain_index.ndim else []
    for dim in dims:
        if varies(gain_index, dim):
            raise Conflict
    for dim in dims:
        gain_index = gain_index.select(dim, 0) if gain_index.shape[dim] else gain_index.sum(dim)
    return gain_index


def taken(gain_index: Tensor, dim: int, index_shape: Sequence[int]) -> Tensor:
    """The gain index after rows along `dim` were picked by an index of unknown content."""
    rest = without(gain_index, [dim])
    dim %= gain_index.ndim
    for _ in index_shape:
        rest = rest.unsqueeze(dim)
    shape = (*gain_index.shape[:dim], *index_shape, *gain_index.shape[dim + 1 :])
    return rest.expand(shape)
