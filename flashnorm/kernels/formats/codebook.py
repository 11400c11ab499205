"""Four bits that name one of 16 numbers: `W = table[q] · scale`, as bitsandbytes' NF4 and FP4.

Two q in a byte, the even feature in the HIGH half, [k, n / 2]; scale is the largest magnitude of a
group of features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm.kernels.formats.groups import spread, unfit_rows
from flashnorm.kernels.weights import Weight, WeightFormat, register


def _dequantize(weight: Weight) -> Tensor:
    assert weight.table is not None
    packed = weight.values[: weight.outputs].view(torch.uint8)
    q = torch.stack([packed >> 4, packed & 15], -1).flatten(-2)[:, : weight.features]
    values = weight.table.double()[q.long()]
    scales = spread(weight, weight.scales)
    return values if scales is None else values * scales


def _unfit(weight: Weight) -> str:
    table = weight.table
    if table is None or table.shape != (16,) or table.dtype != torch.float32:
        return "there is no table of 16 float32 numbers"
    if weight.zeros is not None or weight.offsets is not None:
        return "a table has neither zeros nor offsets"
    if weight.group % 2:
        return f"groups of {weight.group} features end within a byte"
    return unfit_rows(weight, -(-weight.features // 2), torch.uint8, torch.int8)


CODEBOOK4 = register(WeightFormat("codebook4", _dequantize, _unfit, 19))
