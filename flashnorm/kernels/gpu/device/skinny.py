"""Norm + linear for few rows: the weights are a stream, the norm costs no kernel and no pass.

Tiles are [columns, rows], because the weights are the larger side. One row is multiplied by
multiply-add in float32, several by the matrix units. Where n is cut into parts, the program that
ends last adds them up, always in the same order.
"""

import triton
import triton.language as tl

from flashnorm.kernels.gpu.device.dependent import ahead, release, wait
from flashnorm.kernels.gpu.device.gate import finish
from flashnorm.kernels.gpu.device.parts import (
    function_of_x,
    is_last,
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
    row = row[None, :]
    at = at[:, None]
    inside = (row < rows) & (at < k)
    if residual is not None:
        added = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        out += added.to(tl.float32)
    tl.store(y + row.to(tl.int64) * k + at, narrow(out, y.dtype.element_ty), mask=inside)


@triton.jit
def elements(a):
    """Where the elements of a tile lie in memory of its own."""
    width: tl.constexpr = a.shape[1]
    return tl.arange(0, a.shape[0])[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def kept(
    partial, squares_of, a, b, squares, place, ACTIVATION: tl.constexpr, STATISTICS: tl.constexpr
):
    """Leave the sums of one program at its place, for the last one of its columns."""
    halves: tl.constexpr = 1 if ACTIVATION is None else 2
    at = partial + place * (halves * a.numel) + elements(a)
    tl.store(at, a)
    if ACTIVATION is not None:
        tl.store(at + a.numel, b)
    if STATISTICS == "after":
        rows: tl.constexpr = a.shape[1]
        tl.store(squares_of + place * rows + tl.arange(0, rows), squares)


@triton.jit
def added(
    partial,
    squares_of,
    like,
    block,
    blocks,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """What all programs of these columns have kept, added up in the order of the parts."""
    halves: tl.constexpr = 1 if ACTIVATION is None else 2
    rows: tl.constexpr = like.shape[1]
    a = tl.zeros(like.shape, tl.float32)
    b = a
    squares = tl.zeros([rows], tl.float32)
    for split in range(SPLITS):
        place = (split * blocks + block).to(tl.int64)
        at = partial + place * (halves * like.numel) + elements(like)
        a += tl.load(at, cache_modifier=".cg")
        if ACTIVATION is not None:
            b += tl.load(at + like.numel, cache_modifier=".cg")
        if STATISTICS == "after":
            at = squares_of + place * rows + tl.arange(0, rows)
            squares += tl.load(at, cache_modifier=".cg")
    return a, b, squares


@triton.jit
def scaled(
    a,
    b,
    squares,
    x_at,
    n,
    eps,
    bias_a,
    bias_b,
    at,
    k,
    ACTIVATION: tl.constexpr,
    STATISTICS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of the result but for the residual, from whole sums over n: [columns, rows]."""
    scale = 1.0
    if STATISTICS == "after":
        scale = scale_of_squares(squares, x_at, n, eps, a.shape[1], DEPTH)[None, :]
    return finish(a, b, scale, bias_a, bias_b, at[:, None], k, ACTIVATION)


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
    counters,
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
    PDL: tl.constexpr,
    LINES: tl.constexpr,
):
    """y_i = norm(x) W_iᵀ + c_i for up to three weights that share x, or act(y_0) ⊙ y_1 + residual.

    STATISTICS "first" reads x for them before the products, "after" sums Σx² up along with the
    products and scales those, "none" is for norms without any. With SPLITS every program has a part
    of n. With PDL the kernel starts before what makes x has ended, and meanwhile asks for the first
    LINES cache lines of every row of its weights.
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    whole = block  # among those of all weights
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
    part = tl.cdiv(tl.cdiv(n, DEPTH), SPLITS) * DEPTH
    last = tl.minimum(n, split * part + part)
    if PDL:
        ahead(w_at, split * part, last, LINES)
        if ACTIVATION is not None:
            ahead(w1_at, split * part, last, LINES)
    wait(PDL)
    release(PDL)
    if STATISTICS == "first":
        s, m, rest = scan_statistics(x_at, n, eps, NORM, ROWS, DEPTH)

    a = tl.zeros([COLUMNS, DEPTH if ROWS == 1 else ROWS], tl.float32)
    b = a
    squares = tl.zeros([ROWS, DEPTH], tl.float32)
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
    squares = tl.sum(squares, axis=1)

    if SPLITS > 1:
        place = (split * blocks + whole).to(tl.int64)
        kept(partial, partial_squares, a, b, squares, place, ACTIVATION, STATISTICS)
        if is_last(counters + whole, SPLITS):
            a, b, squares = added(
                partial, partial_squares, a, whole, blocks, ACTIVATION, SPLITS, STATISTICS
            )
            out = scaled(
                a, b, squares, x_at, n, eps, bias, bias1, at, k, ACTIVATION, STATISTICS, DEPTH
            )
            written(out, y, residual, residual_stride, row, rows, at, k)
    else:
        out = scaled(a, b, squares, x_at, n, eps, bias, bias1, at, k, ACTIVATION, STATISTICS, DEPTH)
        written(out, y, residual, residual_stride, row, rows, at, k)
