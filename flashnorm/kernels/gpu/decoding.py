"""Packed weights that the kernel for few rows decodes as it loads them, and how each is read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashnorm.kernels.call import Call
from flashnorm.kernels.formats.groups import INT4_GROUPS, INT8_GROUPS
from flashnorm.kernels.formats.rows import FP8_ROWS, INT8_ROWS
from flashnorm.kernels.gpu.launch import MOST_ROWS, Device, interpreted
from flashnorm.kernels.weights import FP8, Weight, packed

LEAST_GROUP = 32  # features: half of them, in the bytes of two, are a step of the matrix units
CONVERTS_FP8 = (8, 9)  # capability from which the hardware does


class Kind(NamedTuple):
    """What the kernel calls a format, and how many features are in a byte of it."""

    name: str
    each: int = 1


KINDS = {
    INT8_ROWS.name: Kind("int8"),
    INT8_GROUPS.name: Kind("int8"),
    FP8_ROWS.name: Kind("fp8"),
    INT4_GROUPS.name: Kind("int4", 2),
}


def kind_of(weight: Weight) -> Kind:
    return KINDS[weight.format.name]


def group_of(weight: Weight) -> int:
    """Features that share a scale; 0 where all of a row do."""
    return weight.group if 0 < weight.group < weight.features else 0


def values_of(weight: Weight, device: Device) -> Tensor:
    """The values in a dtype that the kernel reads: FP8 as bytes where a GPU does not convert it."""
    values = weight.values
    if values.dtype == FP8:
        converts = device.capability >= CONVERTS_FP8 and not interpreted()
        return values if converts else values.view(torch.uint8)
    return values.view(torch.uint8) if kind_of(weight).each > 1 else values


def zeros_come_off(weight: Weight, rows: int) -> str | None:
    """Where zeros are subtracted: "each" level, sums of levels ("sum"), or None without any.

    rows: of the tile. The matrix units take levels in half precision, to 256 without rounding.
    """
    zeros = weight.zeros
    if zeros is None:
        return None
    far = kind_of(weight).name == "int8" and zeros.dtype == torch.uint8
    whole = not zeros.is_floating_point() and kind_of(weight).name != "fp8" and not far
    return "each" if rows == 1 or whole else "sum"


def alike(weight: Weight) -> tuple[Any, ...]:
    """What has to be equal in weights that one launch reads."""
    read = [
        part if part is None else (part.dtype, [step == 1 for step in part.stride()])
        for part in (weight.scales, weight.zeros, weight.offsets)
    ]
    return kind_of(weight), weight.values.dtype, group_of(weight), read


def why_not(call: Call) -> str | None:
    """Why packed weights of a call cannot be read, or None where they can, or are none."""
    if (first := packed(call.weights)) is None:
        return None
    rows = call.x.numel() // call.x.shape[-1]
    if rows > MOST_ROWS:
        return f"x has {rows} rows; with packed weights the kernels take {MOST_ROWS} at most"
    for weight in call.weights:
        if not isinstance(weight, Weight):
            return "some weights are packed and others dense; the kernels take them apart only"
        if reason := _unknown(weight, call.x):
            return reason
        if call.activation is not None and alike(weight) != alike(first):
            return "gate and up are packed in different ways"
    return None


def _unknown(weight: Weight, x: Tensor) -> str | None:
    if weight.format.name not in KINDS:
        return f"the kernels do not know weights in the format {weight.format.name!r}"
    if reason := weight.unfit():
        return reason
    if group_of(weight) % LEAST_GROUP:
        return (
            f"a scale is for {weight.group} features; the kernels take multiples of {LEAST_GROUP}"
        )
    for tensor in weight.tensors():
        if tensor.device != x.device:
            return f"x is on {x.device} and a weight on {tensor.device}"
    return None
