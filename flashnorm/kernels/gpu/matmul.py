"""A call on the library's product, between a norm and a gate that take one pass each.

Weights that lie one behind the other are one product: halves of one weight, or what
`accelerate_(adjacent_weights=True)` has laid out so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu.gemm import as_it_is, only_scales, scaled_rows
from flashnorm.kernels.gpu.rows import gate_step, normalize_step
from flashnorm.kernels.gpu.step import execute
from flashnorm.kernels.weights import joined


def scales_late(call: Call) -> bool:
    """Whether s waits for a pass over the products that is made anyhow; then x is read only.

    Products of float16 that are not scaled yet could be too large for it, and a bias could cancel a
    product that the library has rounded already.
    """
    follows = call.activation is not None or call.output_residual is not None
    biased = any(bias is not None for bias in call.biases or ())
    return follows and only_scales(call) and not biased and call.x.dtype != torch.float16


def run(call: Call) -> list[Tensor]:
    """call.x: [rows, n] with dense rows, residual the same; returns [rows, k_i]."""
    s = None
    if scales_late(call):
        x, s, step = scaled_rows(call)
        execute([step])
    else:
        call = call.added()
        x = call.x
        if not as_it_is(call):
            x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            execute([normalize_step(call, x)])
    biases = list(call.biases or [None] * len(call.weights))
    found = products(x, call.dense_weights(), biases)
    if call.activation is None and call.output_residual is None:
        return found
    y = x.new_empty(found[0].shape)
    if y.numel():
        execute([gate_step(call, found, s, y)])
    return [y]


def as_one(
    weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None] | None:
    """All weights and biases as one of each, where they lie one behind the other in memory.

    biases: those that are given, for all weights or for none.
    """
    if len(biases) not in (0, len(weights)) or (whole := joined(weights)) is None:
        return None
    bias = joined(biases) if biases else None
    return (whole, bias) if bias is not None or not biases else None


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`[x W_iᵀ + c_i]`: one product where `as_one` has it.

    Its results are views of one matrix then, [rows, k_i] with rows that lie apart.
    """
    whole = as_one(weights, [bias for bias in biases if bias is not None])
    if whole is None or len(weights) == 1:
        return [F.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
    return list(F.linear(x, *whole).split([w.shape[0] for w in weights], dim=1))
