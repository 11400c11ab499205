"""The identities of deferral as plain functions: what every faster runtime must equal."""

from flashnorm.functional.attention import rope, scaled_rope_tables, shared_gain_tables
from flashnorm.functional.deferral import (
    deferred_layer_linear,
    deferred_linear,
    dyt_linear,
    glu,
    reglu,
    relu_ffn,
    row_scale,
    sum_gain,
    sum_scale,
)

__all__ = [
    "deferred_layer_linear",
    "deferred_linear",
    "dyt_linear",
    "glu",
    "reglu",
    "relu_ffn",
    "rope",
    "row_scale",
    "scaled_rope_tables",
    "shared_gain_tables",
    "sum_gain",
    "sum_scale",
]
