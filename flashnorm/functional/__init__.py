"""Norm + linear as one operation, and the identities of deferral as plain functions."""

from flashnorm.functional.attention import rope, scaled_rope_tables, shared_gain_tables
from flashnorm.functional.deferral import (
    deferred_layer_linear,
    deferred_linear,
    glu,
    reglu,
    relu_ffn,
    row_scale,
    sum_gain,
    sum_scale,
)
from flashnorm.functional.fused import (
    dyt_linear,
    explain,
    layer_norm_linear,
    norm_glu,
    norm_linear,
    norm_linears,
    rms_norm_linear,
)
from flashnorm.functional.prepared import Prepared
from flashnorm.functional.scaled import (
    QuantizedWeight,
    quantize_rows,
    quantize_weight,
    scaled_norm_linear,
)

__all__ = [
    "Prepared",
    "QuantizedWeight",
    "deferred_layer_linear",
    "deferred_linear",
    "dyt_linear",
    "explain",
    "glu",
    "layer_norm_linear",
    "norm_glu",
    "norm_linear",
    "norm_linears",
    "quantize_rows",
    "quantize_weight",
    "reglu",
    "relu_ffn",
    "rms_norm_linear",
    "rope",
    "row_scale",
    "scaled_norm_linear",
    "scaled_rope_tables",
    "shared_gain_tables",
    "sum_gain",
    "sum_scale",
]
