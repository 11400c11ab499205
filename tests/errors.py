"""How far two results are apart, and how far rounding alone can have moved them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from flashnorm.verification.bounds import Size, output_bound


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |Δ| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())


def rounding(
    width: int,
    depth: int,
    stored: torch.dtype = torch.float64,
    computed: torch.dtype | None = None,
) -> float:
    """`bounds.output_bound`; sums are in the stored dtype unless they are `computed` in another.

    width: terms of the longest product; depth: matrices and norms that the data passes.
    """
    return output_bound(Size(width, depth, stored), computed or stored)


def nudged(model: nn.Module) -> nn.Module:
    """A copy with every weight moved by about one rounding: what noise does to its outputs."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            step = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.mul_(1 + step.to(parameter.dtype) * torch.finfo(parameter.dtype).eps)
    return moved
