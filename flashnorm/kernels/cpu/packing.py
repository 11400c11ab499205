"""Packed weights as the library reads them (`csrc/formats.h`), and which of them it takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flashnorm.kernels.call import Call
from flashnorm.kernels.weights import DTYPES, ZEROS, Weight, packed


def why_not(call: Call) -> str:
    """Why the kernels cannot take a call's packed weights; empty where they can, or none is."""
    first = packed(call.weights)
    if first is None:
        return ""
    if first.format.code is None:
        return f"the kernels do not know weights in the format {first.format.name!r}"
    for weight in call.weights:
        if not isinstance(weight, Weight) or _kind(weight) != _kind(first):
            return "the weights are of several formats, and one call takes one"
        if reason := weight.unfit():
            return f"a weight is not as {weight.format.name!r} says: {reason}"
        if not all(part.is_cpu for part in weight.tensors()):
            return "a packed weight is not on the CPU"
        if weight.table is not None and not weight.table.is_contiguous():
            return "the table of a weight is not dense"
    if len({bias.dtype for bias in call.biases or () if bias is not None}) > 1:
        return "biases are of several dtypes, and one call takes one"
    return ""


def _kind(weight: Weight) -> tuple[object, ...]:
    """What weights of one call have in common."""
    grids = (weight.scales, weight.zeros, weight.offsets)
    return weight.format, weight.group, *(g is not None and g.dtype for g in grids)


def parts(weight: Weight) -> int:
    """Which of scales, zeros, offsets and table there are, a bit each."""
    given = (weight.scales, weight.zeros, weight.offsets, weight.table)
    return sum(1 << bit for bit, part in enumerate(given) if part is not None)


def fixed(weight: Weight, n: int) -> tuple[tuple[int, int, int, int], int]:
    """(format, dtypes of scales, zeros and offsets), features of a group."""
    code = weight.format.code
    assert code is not None
    scales, zeros, offsets = weight.scales, weight.zeros, weight.offsets
    types = (
        code,
        0 if scales is None else DTYPES[scales.dtype],
        0 if zeros is None else ZEROS[zeros.dtype],
        0 if offsets is None else DTYPES[offsets.dtype],
    )
    return types, weight.group or n


def segment(weight: Weight, bias: int) -> Sequence[int]:
    """The numbers of csrc/api.h's Segment, with the address of a bias or 0."""
    values = weight.values
    place = (values.data_ptr(), bias, weight.outputs, values.stride(0), 1)
    table = 0 if weight.table is None else weight.table.data_ptr()
    return (*place, *_grid(weight.scales), *_grid(weight.zeros), *_grid(weight.offsets), table)


def _grid(part: Tensor | None) -> tuple[int, int, int]:
    if part is None:
        return 0, 0, 0
    row, group = part.stride()
    return part.data_ptr(), row, group
