"""torchao's tensors with quantized weights and unquantized activations.

    Int8Tensor, IntxUnpackedToInt8Tensor   W = (q − zero) · scale, q int8 [k, n]
    Float8Tensor                           W = q · scale, q float8_e4m3fn [k, n]

scale and zero are [k, n / group], or one for each row, or one for all. By the names of torchao's
own classes: a tensor of one of them is only there where torchao has been imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashnorm.kernels.formats.groups import INT8_GROUPS
from flashnorm.kernels.formats.rows import FP8_ROWS, INT8_ROWS
from flashnorm.kernels.weights import FP8, INT8, Weight, WeightFormat
from flashnorm.quantized.layout import Unreadable
from flashnorm.quantized.subclass import Inside, register

ACTIVATIONS = "torchao quantizes what it multiplies as well, row by row: it runs its own code"
OPAQUE = (
    "its weight is packed as {}, for a product of torchao's own; IntxWeightOnlyConfig(torch.int4, "
    "PerGroup(32)) packs four bits in a way that is read"
)
UNKNOWN = "its weight is packed as torchao's {}, which no layout reads"
WORDS = {"Int8Tensor": "int8", "IntxUnpackedToInt8Tensor": "int8", "Float8Tensor": "float8"}
# What a tensor does to x before the product, by the names of its attributes.
TO_X = ("act_quant_kwargs", "activation_quantization", "act_pre_scale", "act_mapping_type")
PACKED = ("Int4OpaqueTensor", "IntxOpaqueTensor", "Int4Tensor", "Int4PreshuffledTensor")


@register
def _inside(tensor: Any) -> Inside | str | None:
    kind = type(tensor)
    if not kind.__module__.startswith("torchao."):
        return None
    if any(getattr(tensor, name, None) is not None for name in TO_X):
        return ACTIVATIONS
    if kind.__name__ not in WORDS:
        return (OPAQUE if kind.__name__ in PACKED else UNKNOWN).format(kind.__name__)
    try:
        weight = _read(tensor)
    except Unreadable as error:
        return str(error)
    return reason if (reason := weight.unfit()) else Inside(_origin(tensor), _tensors, _read)


def _origin(tensor: Any) -> str:
    group, word = tensor.block_size[1], WORDS[type(tensor).__name__]
    if group < tensor.shape[1]:
        return f"torchao, {word}, a scale for {group} features"
    whole = tensor.block_size[0] > 1
    return f"torchao, {word}, {'one scale' if whole else 'a scale per row'}"


def _tensors(tensor: Any) -> Sequence[Tensor]:
    held = tensor.__dict__  # this is asked at every call
    for name in TO_X:
        if name in held and held[name] is not None:
            raise Unreadable(ACTIVATIONS)
    zeros = held.get("zero_point")
    return (tensor.qdata, tensor.scale) if zeros is None else (tensor.qdata, tensor.scale, zeros)


def _read(tensor: Any) -> Weight:
    """W of a tensor, over its own tensors."""
    (rows, group), (k, n) = tensor.block_size, tensor.shape
    by_tensor = rows == k and group == n
    if (rows != 1 and not by_tensor) or n % group:
        raise Unreadable(f"torchao scales it in blocks of {rows} rows and {group} features")
    if any(getattr(tensor, name, None) is not None for name in TO_X):
        raise Unreadable(ACTIVATIONS)
    scale = tensor.scale.reshape(1, 1).expand(k, 1) if by_tensor else tensor.scale
    zeros = _zeros(tensor, group < n)
    grouped = group < n or zeros is not None
    made = _format(tensor, grouped)
    return Weight(tensor.qdata, made, scale, k, n, group if grouped else 0, zeros)


def _format(tensor: Any, grouped: bool) -> WeightFormat:
    dtype = tensor.qdata.dtype
    if dtype == FP8:
        return FP8_ROWS
    if dtype != INT8:
        raise Unreadable(f"torchao holds it as {dtype}")
    return INT8_GROUPS if grouped else INT8_ROWS


def _zeros(tensor: Any, grouped: bool) -> Tensor | None:
    """Its zero points, where there is one that is not zero."""
    zeros = getattr(tensor, "zero_point", None)
    if zeros is None or not bool(zeros.any()):
        return None
    if zeros.dtype != torch.int8:
        raise Unreadable(f"its zero points are {zeros.dtype}, which torchao cuts to integers")
    if type(tensor).__name__ == "Int8Tensor" and not grouped:
        raise Unreadable("it has zero points per row, which torchao leaves out of its product")
    return zeros
