"""A call on the library's product, between a norm and a gate that take one pass each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels import norms
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu.gemm import as_it_is, only_scales
from flashnorm.kernels.gpu.rows import gate_step, normalize_step, row_scale_step
from flashnorm.kernels.gpu.step import execute


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
    x, s, biases = call.x, None, call.biases or [None] * len(call.weights)
    if scales_late(call):
        s = x.new_empty(x.shape[0], dtype=torch.float32)
        execute([row_scale_step(x, norms.RMS, call.eps, s, None)])
    elif not as_it_is(call):
        x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        execute([normalize_step(call, x)])
    found = [F.linear(x, w, bias) for w, bias in zip(call.dense_weights(), biases, strict=True)]
    if call.activation is None and call.output_residual is None:
        return found
    y = torch.empty_like(found[0])
    if y.numel():
        execute([gate_step(call, found, s, y)])
    return [y]
