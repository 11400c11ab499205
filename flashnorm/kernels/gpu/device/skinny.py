"""Norm + linear for few rows: the weights are a stream, the norm costs no kernel and no pass.

Tiles are [columns, rows], because the weights are the larger side. One row is multiplied by
multiply-add in float32, several by the matrix units.
"""

import triton
import triton.language as tl

from flashnorm.kernels.gpu.device.gate import finish
from flashnorm.kernels.gpu.device.parts import (
    function_of_x,
    narrow,
    product,
    scale_of_squares,
    scan_statistics,
)


@triton.jit
def multiplied(w_at, deep, inside, z, total, PRECISION: tl.constexpr, ROWS: tl.constexpr):
    """total + w z: by element where x is one row, z in float32; else by the matrix units."""
    w = tl.load(w_at[:, None] + deep[None, :], mask=inside, other=0.0)
    if ROWS == 1:
        total += w.to(tl.float32) * z
    else:
        total = product(w, tl.trans(z), total, PRECISION)
    return total


@triton.jit
def written(out, y, residual, residual_stride, row, rows, at, k):
    """Store a tile [columns, rows] of a result, and add the residual to it."""
    inside = (row < rows) & (at < k)
    if residual is not None:
        added = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        out += added.to(tl.float32)
    tl.store(y + row.to(tl.int64) * k + at, narrow(out, y.dtype.element_ty), mask=inside)


@triton.jit
def skinny(
    x,
    x_stride,
    gain,
    offset,
    norm_bias,
    alpha,
    w0,
    w0_stride,
    bias0,
    y0,
    k0,
    w1,
    w1_stride,
    bias1,
    y1,
    k1,
    w2,
    w2_stride,
    bias2,
    y2,
    k2,
    residual,
    residual_stride,
    partial,
    partial_squares,
    rows,
    n,
    eps,
    NORM: tl.constexpr,
    STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y_i = norm(x) W_iᵀ + c_i for up to three weights that share x, or act(y_0) ⊙ y_1 + residual.

    STATISTICS "first" reads x for them before the products, "after" sums Σx² up along with the
    products and scales those, "none" is for norms without any. With SPLITS the products of a part
    of n and its Σx² are left for `finish_splits`.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    w, w_stride, bias, y, k = w0, w0_stride, bias0, y0, k0
    if WEIGHTS > 1 and ACTIVATION is None:
        passed = tl.cdiv(k0, COLUMNS)
        if block >= passed:
            block -= passed
            w, w_stride, y, k = w1, w1_stride, y1, k1
            if bias1 is not None:
                bias = bias1
            if WEIGHTS > 2:
                passed = tl.cdiv(k1, COLUMNS)
                if block >= passed:
                    block -= passed
                    w, w_stride, y, k = w2, w2_stride, y2, k2
                    if bias2 is not None:
                        bias = bias2

    row = tl.arange(0, ROWS)
    at = block * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    x_at = x + tl.minimum(row, rows - 1).to(tl.int64) * x_stride
    column = tl.minimum(at, k - 1).to(tl.int64)
    w_at = w + column * w_stride
    if ACTIVATION is not None:
        w1_at = w1 + column * w1_stride
    if STATISTICS == "first":
        s, m, rest = scan_statistics(x_at, n, eps, NORM, ROWS, DEPTH)

    a = tl.zeros([COLUMNS, DEPTH if ROWS == 1 else ROWS], tl.float32)
    b = a
    squares = tl.zeros([ROWS, DEPTH], tl.float32)
    part = tl.cdiv(tl.cdiv(n, DEPTH), SPLITS) * DEPTH
    last = tl.minimum(n, split * part + part)
    for begin in tl.range(split * part, last, DEPTH, num_stages=STAGES):
        deep = begin + steps
        inside = (deep < n)[None, :]
        tile = tl.load(x_at[:, None] + deep[None, :], mask=inside, other=0.0)
        v = tile.to(tl.float32)
        if STATISTICS == "after":
            squares += v * v
        if STATISTICS == "first":
            v = ((v - m[:, None]) - rest[:, None]) * s[:, None]
        if STATISTICS == "first" or NORM == "dyt" or gain is not None or norm_bias is not None:
            v = function_of_x(v, deep, n, gain, offset, norm_bias, alpha, NORM)
            tile = narrow(v, w.dtype.element_ty)
        z = v if ROWS == 1 else tile
        a = multiplied(w_at, deep, inside, z, a, PRECISION, ROWS)
        if ACTIVATION is not None:
            b = multiplied(w1_at, deep, inside, z, b, PRECISION, ROWS)
    if ROWS == 1:
        a = tl.sum(a, axis=1)[:, None]
        b = tl.sum(b, axis=1)[:, None]

    at = at[:, None]
    if SPLITS > 1:
        inside = (row < rows)[None, :] & (at < k)
        place = partial + (split * WEIGHTS * rows + row)[None, :] * k + at
        tl.store(place, a, mask=inside)
        if ACTIVATION is not None:
            tl.store(place + rows * k, b, mask=inside)
        if STATISTICS == "after":
            place = partial_squares + split * rows + row
            stored = tl.where(block == 0, rows, 0)  # by the first of a part's programs
            tl.store(place, tl.sum(squares, axis=1), mask=row < stored)
    else:
        scale = 1.0
        if STATISTICS == "after":
            scale = scale_of_squares(tl.sum(squares, axis=1), x_at, n, eps, ROWS, DEPTH)[None, :]
        out = finish(a, b, scale, bias, bias1, at, k, ACTIVATION)
        written(out, y, residual, residual_stride, row[None, :], rows, at, k)


@triton.jit
def finish_splits(
    x,
    x_stride,
    partial,
    partial_squares,
    bias0,
    bias1,
    residual,
    residual_stride,
    y,
    rows,
    n,
    k,
    eps,
    STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add the parts of `skinny` up, always in the same order, and do what is left to do."""
    row = tl.arange(0, ROWS)
    at = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    inside = (row < rows)[None, :] & (at < k)
    a = tl.zeros([COLUMNS, ROWS], tl.float32)
    b = a
    squares = tl.zeros([ROWS], tl.float32)
    for split in range(SPLITS):
        place = partial + (split * WEIGHTS * rows + row)[None, :] * k + at
        a += tl.load(place, mask=inside, other=0.0)
        if ACTIVATION is not None:
            b += tl.load(place + rows * k, mask=inside, other=0.0)
        if STATISTICS == "after":
            last = tl.minimum(row, rows - 1)
            squares += tl.load(partial_squares + split * rows + last)
    scale = 1.0
    if STATISTICS == "after":
        x_at = x + tl.minimum(row, rows - 1).to(tl.int64) * x_stride
        scale = scale_of_squares(squares, x_at, n, eps, ROWS, DEPTH)[None, :]
    out = finish(a, b, scale, bias0, bias1, at, k, ACTIVATION)
    written(out, y, residual, residual_stride, row[None, :], rows, at, k)
