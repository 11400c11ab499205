"""Packed rows as plain numbers, a few rows at a time, each rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from flashnorm.kernels.weights import HALVES

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


class Rows(Protocol):
    """Rows of a weight, [outputs, features], wherever their numbers are."""

    @property
    def outputs(self) -> int: ...

    @property
    def features(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def rows(self, which: slice | Tensor) -> Rows:
        """Some of them: a view for a slice, a copy for indices."""

    def dequantized(self) -> Tensor:
        """Their numbers, [outputs, features], float64."""


def decoded(held: Rows, dtype: torch.dtype) -> Tensor:
    """All rows, [k, n]."""
    if held.outputs * held.features <= ELEMENTS:
        return rounded(held.dequantized(), dtype)
    made = torch.empty((held.outputs, held.features), dtype=dtype, device=held.device)
    for first, part in in_blocks(held):
        made[first : first + part.outputs] = rounded(part.dequantized(), dtype)
    return made


def in_blocks(held: Rows) -> Iterator[tuple[int, Rows]]:
    """Some rows each, with the number of their first row."""
    step = max(1, ELEMENTS // max(1, held.features))
    for first in range(0, held.outputs, step):
        yield first, held.rows(slice(first, min(first + step, held.outputs)))
