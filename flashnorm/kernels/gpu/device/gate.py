"""What stands behind a library's product: late scale, bias, gate, residual, in one pass."""

import triton
import triton.language as tl

from flashnorm.kernels.gpu.device.parts import activate, narrow


@triton.jit
def finish(a, b, s, bias_a, bias_b, at, k, ACTIVATION: tl.constexpr):
    """`act(s a + c_a) ⊙ (s b + c_b)`, or `s a + c_a` without an activation.

    a, b: any tile in float32; s, at: broadcast to it; bias_a, bias_b: [k] or None.
    """
    a = a * s
    if bias_a is not None:
        a = a + tl.load(bias_a + at, mask=at < k, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        b = b * s
        if bias_b is not None:
            b = b + tl.load(bias_b + at, mask=at < k, other=0.0).to(tl.float32)
        a = activate(a, ACTIVATION) * b
    return a


@triton.jit
def gate(
    a,
    a_stride,
    b,
    b_stride,
    s,
    residual,
    residual_stride,
    y,
    rows,
    k,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = act(s a) ⊙ (s b) + residual, or s a + residual. All are [rows, k], but s is [rows]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    at = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (at < k)
    first = tl.load(a + row * a_stride + at, mask=inside, other=0.0).to(tl.float32)
    second = first
    if ACTIVATION is not None:
        second = tl.load(b + row * b_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0
    if s is not None:
        scale = tl.load(s + row, mask=row < rows, other=0.0)
    out = finish(first, second, scale, None, None, at, k, ACTIVATION)
    if residual is not None:
        added = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        out += added.to(tl.float32)
    tl.store(y + row * k + at, narrow(out, y.dtype.element_ty), mask=inside)
