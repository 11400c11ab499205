"""How far two results are apart, and how far rounding alone can have moved them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from flashnorm.verification.bounds import Size, output_bound


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |Δ| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())


def rounding(width: int, depth: int, dtype: torch.dtype = torch.float64) -> float:
    """`bounds.output_bound` of a model that is stored and computed in one dtype.

    width: terms of its longest product; depth: matrices and norms that the data passes.
    """
    return output_bound(Size(width, depth, dtype), dtype)


def nudged(model: nn.Module) -> nn.Module:
    """A copy with every weight moved by about one rounding: what noise does to its outputs."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            step = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.mul_(1 + step.to(parameter.dtype) * torch.finfo(parameter.dtype).eps)
    return moved
