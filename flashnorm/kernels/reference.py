"""What norm + linear means: the one reference of tests, benchmarks and documentation.

In float64 (give it float64 tensors) it is the truth that errors are measured against; in any other
dtype it does what an eager model does: norm in float32, rounded to the dtype of x, then the linear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels.call import Call
from flashnorm.kernels.weights import dense

# act(gate) ⊙ up
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def normalized(call: Call) -> Tensor:
    """norm(x) · (offset + gain) + β in the dtype of x, rounded once: the norm's part of a call."""
    call, norm = call.added(), call.norm
    wide = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    z = norm.hat(wide, *norm.statistics(wide, call.eps), call.alpha)
    if call.gain is not None:
        z = z * (call.gain_offset + call.gain.to(z.dtype))
    if call.norm_bias is not None:
        z = z + call.norm_bias.to(z.dtype)
    return z.to(call.x.dtype)


def norm_linear(call: Call) -> list[Tensor]:
    """What `Call` says, one result per weight, or one for a GLU."""
    z, activation, residual = normalized(call), call.activation, call.output_residual
    found = [
        F.linear(z, dense(w, z.dtype), None if c is None else c.to(z.dtype))
        for w, c in zip(call.weights, call.biases or [None] * len(call.weights), strict=True)
    ]
    if activation is not None:
        found = [ACTIVATIONS[activation](found[0]) * found[1]]
    return found if residual is None else [found[0] + residual.to(z.dtype)]
