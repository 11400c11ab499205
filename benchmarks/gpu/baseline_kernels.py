"""Two plain Triton kernels for the other side: a weighted RMSNorm, and silu(gate) ⊙ up.

One row per program, read once, float32 inside: what a fused norm or gate of an inference engine
does. `F.rms_norm` and eager gates are not always that fast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 8192  # columns of a gate that one program takes at most


@triton.jit
def _rms_norm(x, gain, y, n, eps, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < n
    values = tl.load(x + row * n + columns, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / n + eps)
    factor = tl.load(gain + columns, inside, 0.0).to(tl.float32)
    tl.store(y + row * n + columns, (values * scale * factor).to(y.dtype.element_ty), inside)


@triton.jit
def _silu_mul(both, y, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    gate = tl.load(both + 2 * row * width + columns, inside, 0.0).to(tl.float32)
    up = tl.load(both + (2 * row + 1) * width + columns, inside, 0.0).to(tl.float32)
    tl.store(
        y + row * width + columns, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), inside
    )


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x · rsqrt(mean(x²) + ε) · gain, for x [rows, n], dense."""
    y = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _rms_norm[(x.shape[0],)](x, gain, y, x.shape[1], eps, block, num_warps=_warps(block))
    return y


def silu_mul(both: Tensor) -> Tensor:
    """silu(a) ⊙ b for both = [a, b], [rows, 2 · width], dense; returns [rows, width]."""
    rows, width = both.shape[0], both.shape[1] // 2
    y = torch.empty((rows, width), dtype=both.dtype, device=both.device)
    block = min(WIDE, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    _silu_mul[grid](both, y, width, block, num_warps=_warps(block))
    return y


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
