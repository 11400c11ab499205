"""Packed rows as plain numbers, a few rows at a time, each rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashnorm.kernels.weights import HALVES, Weight

# How many numbers are decoded at once: 8 MB of them in float64.
ELEMENTS = 1 << 20


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in float64 rounded once, to nearest, ties to even.

    torch rounds to a dtype of 16 bits by way of float32. Here that first step rounds to odd: what
    float32 does not hold ends in an odd bit, so the second step never sees a tie that was none
    (Boldo and Melquiond 2008: float32 has more than two bits above either dtype).
    """
    if dtype not in HALVES:
        return values.to(dtype)
    near = values.float()
    back = near.double()
    inexact = (back != values) & back.isfinite()
    below = near.view(torch.int32) - (back.abs() > values.abs()).int()  # truncated
    odd = torch.where(inexact, below | 1, near.view(torch.int32))
    return odd.view(torch.float32).to(dtype)


def decoded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """All rows of a weight, [k, n]."""
    if weight.outputs * weight.features <= ELEMENTS:
        return rounded(weight.dequantized(), dtype)
    shape, device = (weight.outputs, weight.features), weight.values.device
    made = torch.empty(shape, dtype=dtype, device=device)
    for first, part in in_blocks(weight):
        made[first : first + part.outputs] = rounded(part.dequantized(), dtype)
    return made


def in_blocks(weight: Weight) -> Iterator[tuple[int, Weight]]:
    """Views of some rows each, with the number of their first row."""
    step = max(1, ELEMENTS // max(1, weight.features))
    for first in range(0, weight.outputs, step):
        yield first, rows(weight, slice(first, min(first + step, weight.outputs)))


def rows(weight: Weight, which: slice | Tensor) -> Weight:
    """Some rows of a weight: a view for a slice, a copy for indices."""
    values = weight.values[: weight.outputs][which]
    return weight._replace(values=values, outputs=values.shape[0])
