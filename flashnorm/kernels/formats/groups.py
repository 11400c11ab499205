"""Scales for groups of features in a row, as torchao, compressed-tensors and GPTQ have them.

    W = (q − zero) · scale + offset

int8-groups: q is int8 [k, n], zero is 0 where none is given. int4-groups: two q in a byte, the even
feature in the low half, [k, n / 2]; q is 0 .. 15, and zero is 8 where none is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm.kernels.weights import DTYPES, Weight, WeightFormat, register

NIBBLE_ZERO = 8
ZERO_DTYPES = (torch.int8, torch.uint8)


def scaled(weight: Weight, q: Tensor, zero: float) -> Tensor:
    """(q − zero) · scale + offset in float64, for q [k, n]."""
    zeros = spread(weight, weight.zeros)
    values = q.double() - (zero if zeros is None else zeros)
    scales, offsets = spread(weight, weight.scales), spread(weight, weight.offsets)
    values = values if scales is None else values * scales
    return values if offsets is None else values + offsets


def spread(weight: Weight, part: Tensor | None) -> Tensor | None:
    """A number for each feature, [k, n] float64, of [k, groups]."""
    if part is None:
        return None
    wide = part[: weight.outputs].double()
    if not weight.group:
        return wide[:, :1].expand(weight.shape)
    return wide.repeat_interleave(weight.group, 1)[:, : weight.features]


def nibbles(packed: Tensor) -> Tensor:
    """[.., n] of bytes [.., n / 2]: the low half of each byte first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def unfit_scales(weight: Weight) -> str:
    """Why scales, zeros or offsets are of no dtype that kernels read; empty where they are."""
    for part in (weight.scales, weight.offsets):
        if part is not None and part.dtype not in DTYPES:
            return f"scales or offsets are {part.dtype}"
    if weight.zeros is not None and weight.zeros.dtype not in (*DTYPES, *ZERO_DTYPES):
        return f"zeros are {weight.zeros.dtype}"
    return ""


def unfit_rows(weight: Weight, width: int, *dtypes: torch.dtype) -> str:
    """Why the values are not [k, width] of one of these dtypes, dense in rows, or empty."""
    values = weight.values
    if values.dtype not in dtypes or values.dim() != 2 or values.shape[0] < weight.outputs:
        return f"values are {list(values.shape)} of {values.dtype}"
    if values.shape[1] < width or values.stride(1) != 1:
        return (
            f"values have rows of {values.shape[1]}, {values.stride(1)} apart; not {width}, dense"
        )
    return unfit_scales(weight)


def _int8(weight: Weight) -> Tensor:
    return scaled(weight, weight.values[: weight.outputs, : weight.features], 0)


def _int4(weight: Weight) -> Tensor:
    bytes_ = weight.values[: weight.outputs].view(torch.uint8)
    return scaled(weight, nibbles(bytes_)[:, : weight.features], NIBBLE_ZERO)


def _int8_unfit(weight: Weight) -> str:
    return unfit_rows(weight, weight.features, torch.int8)


def _int4_unfit(weight: Weight) -> str:
    if weight.group % 2:
        return f"groups of {weight.group} features end within a byte"
    return unfit_rows(weight, -(-weight.features // 2), torch.uint8, torch.int8)


INT8_GROUPS = register(WeightFormat("int8-groups", _int8, _int8_unfit, 16))
INT4_GROUPS = register(WeightFormat("int4-groups", _int4, _int4_unfit, 18))
