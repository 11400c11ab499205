"""Random packed weights, of every kind that the kernels for few rows decode."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashnorm.kernels import weights
from flashnorm.kernels.call import Call
from flashnorm.kernels.weights import FP8, Weight
from tests.kernels.cases import make, random


class Packing(NamedTuple):
    """A format, features of a scale (0: all of a row), and dtypes of scales, zeros and offsets."""

    format: str
    group: int = 0
    scales: torch.dtype | None = torch.float32
    zeros: torch.dtype | None = None
    offsets: torch.dtype | None = None
    turned: bool = False  # scales lie as [groups, k]

    def __str__(self) -> str:
        kinds = [str(d).removeprefix("torch.") for d in self[2:5] if d]
        return "-".join([self.format, str(self.group), *kinds]) + "-turned" * self.turned


INTEGERS = (torch.int8, torch.uint8)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Every format, and all that may be with it once: groups, dtypes, zeros, offsets, how scales lie.
EVERY = [
    Packing("int8-rows"),
    Packing("int8-rows", 0, BF16, torch.int8),
    Packing("int8-groups", 32, F16, turned=True),
    Packing("int8-groups", 64, BF16, torch.int8),
    Packing("int8-groups", 32, F32, torch.uint8),
    Packing("int8-groups", 32, F32, F32, BF16),
    Packing("int4-groups", 32, BF16, turned=True),
    Packing("int4-groups", 64, F16, torch.int8),
    Packing("int4-groups", 32, F32, torch.uint8, turned=True),
    Packing("int4-groups", 32, F32, BF16),
    Packing("int4-groups", 32, BF16, None, BF16, turned=True),
    Packing("int4-groups", 0, F32, torch.int8, F32),
    Packing("fp8-rows"),
    Packing("fp8-rows", 32, BF16),
    Packing("fp8-rows", 0, F32, torch.int8, F16),
]


def make_weight(packing: Packing, k: int, n: int, seed: int = 0) -> Weight:
    """W [k, n] of about n^-0.5; no scale, zero or offset is like another."""
    made = torch.Generator().manual_seed(100 * seed + k + n)
    groups = -(-n // packing.group) if packing.group else 1
    size = {"int8": 70, "int4": 5, "fp8-": 1}[packing.format[:4]] * n**0.5

    def numbers(dtype: torch.dtype | None, scale: float, at: int) -> Tensor | None:
        if dtype is None:
            return None
        if dtype in INTEGERS:
            low, high = (-100, 100) if dtype == torch.int8 else (0, 256)
            found = torch.randint(low, high, (groups, k), generator=made)
            found = (found // 8 if packing.format.startswith("int4") else found).to(dtype)
        else:
            found = random(groups, k, dtype=torch.float64, scale=scale, seed=seed + at).to(dtype)
        return found.T if packing.turned else found.T.contiguous()

    each = 2 if packing.format.startswith("int4") else 1
    if packing.format == "fp8-rows":
        values = random(k, n, dtype=torch.float32, seed=seed).to(FP8)
    elif each == 2:
        values = torch.randint(0, 256, (k, -(-n // 2)), generator=made).to(torch.uint8)
    else:
        values = torch.randint(-128, 128, (k, n), generator=made).to(torch.int8)
    scales = numbers(packing.scales, 1 / size, 1)
    zeros = numbers(packing.zeros, 8 / each, 2)
    offsets = numbers(packing.offsets, n**-0.5, 3)
    found = weights.find(packing.format)
    return Weight(values, found, scales, k, n, packing.group, zeros, offsets)


def make_packed(
    packing: Packing, shape: tuple[int, ...], widths: tuple[int, ...], *given: Any, **more: Any
) -> Call:
    """`cases.make` with packed weights."""
    call = make(shape, widths, *given, **more)
    return call._replace(
        weights=[make_weight(packing, k, shape[-1], i) for i, k in enumerate(widths)]
    )
