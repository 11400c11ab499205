"""Modules: norms without what a fold has moved elsewhere, and building blocks of new models."""

from flashnorm.nn.deferred import FlashLinkedRMSNorm, RowScale, ScaleFeatures
from flashnorm.nn.fused import NormGLU, NormLinear, NormLinears
from flashnorm.nn.norms import DyT, FlashRMSNorm

__all__ = [
    "DyT",
    "FlashLinkedRMSNorm",
    "FlashRMSNorm",
    "NormGLU",
    "NormLinear",
    "NormLinears",
    "RowScale",
    "ScaleFeatures",
]
