"""Norm + linear for many rows: a tiled product with the scale of the rows in its epilogue."""

import triton
import triton.language as tl

from flashnorm.kernels.gpu.device.gate import finish
from flashnorm.kernels.gpu.device.parts import narrow, product


@triton.jit
def tile_of(block, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Which tile a program computes: GROUP rows of tiles at a time, so that they share the L2."""
    width = GROUP * column_blocks
    first = (block // width) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    return first + (block % width) % height, (block % width) // height


@triton.jit
def gemm(
    x,
    x_stride,
    s,
    w0,
    w0_stride,
    bias0,
    w1,
    w1_stride,
    bias1,
    residual,
    residual_stride,
    y,
    rows,
    n,
    k,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = act(s ⊙ (x W0ᵀ) + c0) ⊙ (s ⊙ (x W1ᵀ) + c1) + residual. x: [rows, n], w: [k, n].

    Rows and columns beyond the last repeat it and are not stored.
    """
    row_block, column_block = tile_of(
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(k, COLUMNS), GROUP
    )
    row = row_block * ROWS + tl.arange(0, ROWS)
    at = column_block * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    x_at = x + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * x_stride
    column = tl.minimum(at, k - 1)[None, :].to(tl.int64)
    w0_at = w0 + column * w0_stride
    a = tl.zeros([ROWS, COLUMNS], tl.float32)
    b = a
    if ACTIVATION is not None:
        w1_at = w1 + column * w1_stride
    for begin in range(0, n, DEPTH):
        deep = begin + steps
        inside = deep < n
        tile = tl.load(x_at + deep[None, :], mask=inside[None, :], other=0.0)
        weight = tl.load(w0_at + deep[:, None], mask=inside[:, None], other=0.0)
        a = product(tile, weight, a, PRECISION)
        if ACTIVATION is not None:
            weight = tl.load(w1_at + deep[:, None], mask=inside[:, None], other=0.0)
            b = product(tile, weight, b, PRECISION)
    scale = 1.0
    if s is not None:
        scale = tl.load(s + row, mask=row < rows, other=0.0)[:, None]
    at = at[None, :]
    out = finish(a, b, scale, bias0, bias1, at, k, ACTIVATION)
    row = row[:, None].to(tl.int64)
    inside = (row < rows) & (at < k)
    if residual is not None:
        added = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        out += added.to(tl.float32)
    tl.store(y + row * k + at, narrow(out, y.dtype.element_ty), mask=inside)
