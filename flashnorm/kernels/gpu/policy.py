"""Who computes what on a GPU: eagerly, while a CUDA graph is captured, and in compiled graphs.

Called one by one, operations on a GPU wait for Python, and PyTorch's own take the least of it: the
norm is one of them, and so are the products; with many rows, gate and activation are one pass.
Where nothing waits for Python, a kernel that has the norm inside saves the rest of it: in a
compiled graph, and while a CUDA graph is captured, a norm computes its readers in the same kernel,
and a new token attends by one.
Which of the two runs depends on shapes and on the capture alone, never on addresses or values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels import norms, reference
from flashnorm.kernels.backend import CompiledPolicy, Limits, Policy, Precompute, Way
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu.ways import choose, why_not
from flashnorm.kernels.weights import DTYPES, HALVES

FEW = 64  # rows that a kernel with the norm inside may take
FEW_COMPILED = 16  # of a compiled graph, in which a choice by measurement cannot be made
LIBRARY = (
    "no norm is before it: its product is the library's, but in a compiled graph with few rows, "
    "where a kernel adds the residual too"
)
EAGER_ATTENTION = "called one by one, torch's own attention takes less of Python"
NOT_LOADED = "a kernel for such an attention was not loaded before the capture"

LIMITS = Limits(tuple(DTYPES), 8, packed=FEW)
POLICY = Policy(Precompute.IN_CAPTURE, LIBRARY, few=Way.LIBRARY, many=Way.KERNEL, captured_rows=FEW)
COMPILED = CompiledPolicy(alone=True, precompute=True, fuses=True, defers=True)


def rows(dtype: torch.dtype, compiled: bool) -> int:
    if compiled:
        return FEW_COMPILED if dtype in HALVES else 0
    return FEW


def normalized(call: Call) -> Tensor:
    """norm(x) · (offset + gain) + bias, rounded once: by few of PyTorch's operations."""
    width = call.x.shape[-1:]
    if call.norm is norms.RMS and not call.gain_offset and call.norm_bias is None:
        return F.rms_norm(call.x, width, call.gain, call.eps)
    if call.norm is norms.LAYER and not call.gain_offset:
        return F.layer_norm(call.x, width, call.gain, call.norm_bias, call.eps)
    if call.norm is norms.DYT and not call.gain_offset:
        return _dynamic(call)
    return reference.normalized(call)


def _dynamic(call: Call) -> Tensor:
    """γ ⊙ tanh(αx) + β in four operations, as many as a model's own code takes."""
    x, gain, bias, alpha = call.x, call.gain, call.norm_bias, call.alpha
    if gain is None or bias is None or alpha is None:
        return reference.normalized(call)
    wide = (x * alpha.float().view(1)).tanh_()  # α of no axis would not widen x
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.addcmul(bias, wide, gain, out=z)


def absorbs(call: Call) -> bool:
    """Whether the call runs on a kernel with the norm inside, not on a norm and a library."""
    return why_not(call) is None and choose(call).way != "matmul"
