"""Gated pairs of many rows in a compiled graph: the norm's scale is applied after the products.

    act(z Gᵀ + c) ⊙ (z Uᵀ + d) = act(s·a + c) ⊙ (s·b + d),   a = x Gᵀ, b = x Uᵀ, z = s·x    (E4)

The products read x, so z need not be written: a compiler computes s in the kernel that adds the
residual, and applies it in the one that computes the gate, which are there anyway. Of the former's
four passes over [rows, n] that leaves three. All but the products is in float32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.functional.deferral import row_scale
from flashnorm.kernels import norms, reference
from flashnorm.kernels.call import Call
from flashnorm.runtime.spec import KernelSpec

# x is not normalized before it is multiplied, which in float16 could overflow. In these a square
# does so first, in the model's own norm as well.
DTYPES = (torch.float32, torch.bfloat16)


def defers(spec: KernelSpec, x: Tensor) -> bool:
    """Whether a graph should: a gated pair behind an RMSNorm that has only its scale."""
    if not spec.defers or spec.activation is None or x.device.type != spec.device:
        return False
    norm = spec.norm
    plain = norm.kind == norms.RMS.name and not (norm.gain or norm.bias or norm.offset)
    return plain and x.dtype in DTYPES


def gated(call: Call) -> Tensor:
    """The result of a call that `defers` is for, in torch's operations. x: [.., n]."""
    s = row_scale(call.x.float(), call.eps)
    biases = call.biases or (None, None)
    products = [s * F.linear(call.x, w).float() for w in call.dense_weights()]
    gate, up = (y if c is None else y + c.float() for y, c in zip(products, biases, strict=True))
    assert call.activation is not None
    return (reference.ACTIVATIONS[call.activation](gate) * up).to(call.x.dtype)
