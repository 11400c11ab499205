"""Kernels over whole rows, one program each: statistics, residual + statistics, norm."""

import triton
import triton.language as tl

from flashnorm.kernels.gpu.device.parts import function_of_x, narrow, row_statistics


@triton.jit
def row_scale(x, x_stride, s, mean, n, eps, NORM: tl.constexpr, WIDTH: tl.constexpr):
    """s and mean of every row of x. s, mean: [rows], float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < n
    v = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale, m, rest = row_statistics(v, inside, n, eps, NORM)
    tl.store(s + row, scale)
    if NORM == "layer":
        tl.store(mean + row, m + rest)


@triton.jit
def add_stats(
    x,
    x_stride,
    residual,
    residual_stride,
    total,
    s,
    mean,
    n,
    eps,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """total = x + residual in their dtype, and the statistics of what was written."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < n
    v = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
    rounded = narrow(v, x.dtype.element_ty)
    tl.store(total + row * n + at, rounded, mask=inside)
    scale, m, rest = row_statistics(rounded.to(tl.float32), inside, n, eps, NORM)
    tl.store(s + row, scale)
    if NORM == "layer":
        tl.store(mean + row, m + rest)


@triton.jit
def normalize(
    x,
    x_stride,
    gain,
    offset,
    norm_bias,
    alpha,
    z,
    n,
    eps,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """z = norm(x) · (offset + gain) + β in the dtype of x, rounded once. z: [rows, n], dense."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < n
    v = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if NORM == "rms" or NORM == "layer":
        s, m, rest = row_statistics(v, inside, n, eps, NORM)
        v = ((v - m) - rest) * s
    v = function_of_x(v[None, :], at, n, gain, offset, norm_bias, alpha, NORM)
    out = z + row * n + at
    tl.store(out[None, :], narrow(v, z.dtype.element_ty), mask=inside[None, :])
