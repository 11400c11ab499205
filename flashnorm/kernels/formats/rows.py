"""One scale for each output: `W = values · scale`, values in 8 bits, [k, n] or larger.

fp8-rows are float8_e4m3fn; their scales may also be for groups of features.
"""

from __future__ import annotations

from torch import Tensor

from flashnorm.kernels.formats.groups import scaled, unfit_rows
from flashnorm.kernels.weights import FP8, INT8, Weight, WeightFormat, register


def _by_rows(weight: Weight) -> Tensor:
    return scaled(weight, weight.values[: weight.outputs, : weight.features].double(), 0)


def _fp8_unfit(weight: Weight) -> str:
    return unfit_rows(weight, weight.features, FP8)


def _int8_unfit(weight: Weight) -> str:
    return unfit_rows(weight, weight.features, INT8)


FP8_ROWS = register(WeightFormat("fp8-rows", _by_rows, _fp8_unfit, 17))
INT8_ROWS = register(WeightFormat("int8-rows", _by_rows, _int8_unfit, 16))
