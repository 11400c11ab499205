"""Norm + linear for few rows with packed weights: `skinny` with another product.

A step along n ends where a group ends, or before: so sums of a step have one scale per column.
"""

import triton
import triton.language as tl

from flashnorm.kernels.gpu.device.dependent import ahead, release, wait
from flashnorm.kernels.gpu.device.levels import part, scaled_by_group, terms
from flashnorm.kernels.gpu.device.parts import (
    function_of_x,
    is_last,
    narrow,
    scan_statistics,
)
from flashnorm.kernels.gpu.device.skinny import added, kept, scaled, written


@triton.jit
def rows_of_x(
    x_at,
    row,
    rows,
    deep,
    n,
    s,
    m,
    rest,
    squares,
    gain,
    offset,
    norm_bias,
    alpha,
    NORM: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Elements `deep` of the rows as they are multiplied, one row in float32, and Σx² so far.

    (Almost what `skinny` does in its loop, which takes other registers where it calls a function.)
    """
    inside = (row < rows)[:, None] & (deep < n)[None, :]
    z = tl.load(x_at[:, None] + deep[None, :], mask=inside, other=0.0)
    v = z.to(tl.float32)
    if STATISTICS == "after":
        squares += v * v
    if STATISTICS == "first":
        v = ((v - m[:, None]) - rest[:, None]) * s[:, None]
    if STATISTICS == "first" or NORM == "dyt" or gain is not None or norm_bias is not None:
        v = function_of_x(v, deep, n, gain, offset, norm_bias, alpha, NORM)
        v = tl.where(inside, v, 0.0)  # beyond n the level of a byte may not be zero
        z = narrow(v, z.dtype)
    if z.shape[0] == 1:
        z = v
    return z, squares


@triton.jit
def step(
    w_at,
    scale_at,
    scale_step,
    zero_at,
    zero_step,
    offset_at,
    offset_step,
    place,
    taken,
    z,
    odd,
    sum_of_z,
    zero,
    total,
    PRECISION: tl.constexpr,
    FORMAT: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    BYTES: tl.constexpr,
):
    """total and what BYTES bytes of each column add; where a scale is a row's, without it."""
    if GROUP:
        group = place * (DEPTH // BYTES) // GROUP
        scale = None if scale_at is None else part(scale_at, group, scale_step)
        off = None if zero_at is None else part(zero_at, group, zero_step)
        offset = None if offset_at is None else part(offset_at, group, offset_step)
        sums = tl.zeros(total.shape, tl.float32)
        sums = terms(w_at, place, taken, z, odd, off, sums, PRECISION, FORMAT, ZEROS, BYTES)
        total += scaled_by_group(sums, sum_of_z, scale, off, offset, ZEROS)
    else:
        total = terms(w_at, place, taken, z, odd, zero, total, PRECISION, FORMAT, ZEROS, BYTES)
    return total


@triton.jit
def packed(
    x,
    x_stride,
    gain,
    offset,
    norm_bias,
    alpha,
    w0,
    w0_stride,
    scales0,
    scales0_row,
    scales0_group,
    zeros0,
    zeros0_row,
    zeros0_group,
    offsets0,
    offsets0_row,
    offsets0_group,
    bias0,
    y0,
    k0,
    w1,
    w1_stride,
    scales1,
    scales1_row,
    scales1_group,
    zeros1,
    zeros1_row,
    zeros1_group,
    offsets1,
    offsets1_row,
    offsets1_group,
    bias1,
    y1,
    k1,
    w2,
    w2_stride,
    scales2,
    scales2_row,
    scales2_group,
    zeros2,
    zeros2_row,
    zeros2_group,
    offsets2,
    offsets2_row,
    offsets2_group,
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
    taken,
    eps,
    NORM: tl.constexpr,
    STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    FORMAT: tl.constexpr,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    LINES: tl.constexpr,
):
    """`skinny.skinny` for weights of bytes, `taken` of them in a row of each.

    FORMAT: "int8", "fp8" or "int4", of which two are in a byte. ZEROS: None, "each" where they come
    off every level, "sum" where they come off sums. GROUP: features that share a scale; 0: all.
    """
    block = tl.program_id(0)
    whole = block  # among those of all weights
    w, w_stride, bias, y, k = w0, w0_stride, bias0, y0, k0
    scales, scales_row, scales_group = scales0, scales0_row, scales0_group
    zeros, zeros_row, zeros_group = zeros0, zeros0_row, zeros0_group
    offsets, offsets_row, offsets_group = offsets0, offsets0_row, offsets0_group
    if WEIGHTS > 1 and ACTIVATION is None:
        passed = tl.cdiv(k0, COLUMNS)
        if block >= passed:
            block -= passed
            w, w_stride, bias, y, k = w1, w1_stride, bias1, y1, k1
            scales, scales_row, scales_group = scales1, scales1_row, scales1_group
            zeros, zeros_row, zeros_group = zeros1, zeros1_row, zeros1_group
            offsets, offsets_row, offsets_group = offsets1, offsets1_row, offsets1_group
            if WEIGHTS > 2:
                passed = tl.cdiv(k1, COLUMNS)
                if block >= passed:
                    block -= passed
                    w, w_stride, bias, y, k = w2, w2_stride, bias2, y2, k2
                    scales, scales_row, scales_group = scales2, scales2_row, scales2_group
                    zeros, zeros_row, zeros_group = zeros2, zeros2_row, zeros2_group
                    offsets, offsets_row, offsets_group = offsets2, offsets2_row, offsets2_group

    EACH: tl.constexpr = 2 if FORMAT == "int4" else 1  # features in a byte
    BYTES: tl.constexpr = DEPTH // EACH
    OFFSETS: tl.constexpr = offsets0 is not None or offsets1 is not None
    SUM_OF_Z: tl.constexpr = ZEROS == "sum" or OFFSETS
    row = tl.arange(0, ROWS)
    at = block * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    x_at = x + tl.minimum(row, rows - 1).to(tl.int64) * x_stride
    column = tl.minimum(at, k - 1).to(tl.int64)
    w_at = w + column * w_stride
    scale_at = None if scales is None else scales + column * scales_row
    zero_at = None if zeros is None else zeros + column * zeros_row
    offset_at = None if offsets is None else offsets + column * offsets_row
    if ACTIVATION is not None:
        w1_at = w1 + column * w1_stride
        scale1_at = None if scales1 is None else scales1 + column * scales1_row
        zero1_at = None if zeros1 is None else zeros1 + column * zeros1_row
        offset1_at = None if offsets1 is None else offsets1 + column * offsets1_row
    share = tl.cdiv(tl.cdiv(taken, BYTES), SPLITS) * BYTES
    first = tl.program_id(1) * share
    last = tl.minimum(taken, first + share)
    if PDL:
        ahead(w_at, first, last, LINES)
        if ACTIVATION is not None:
            ahead(w1_at, first, last, LINES)
    wait(PDL)
    release(PDL)
    s, m, rest = None, None, None
    if STATISTICS == "first":
        s, m, rest = scan_statistics(x_at, n, eps, NORM, ROWS, DEPTH)

    # Of the group 0: of a scale per row, the only one.
    scale = None if scale_at is None else part(scale_at, first * 0, scales_group)
    zero = None if zero_at is None else part(zero_at, first * 0, zeros_group)
    shift = None if offset_at is None else part(offset_at, first * 0, offsets_group)
    if ACTIVATION is not None:
        scale1 = None if scale1_at is None else part(scale1_at, first * 0, scales1_group)
        zero1 = None if zero1_at is None else part(zero1_at, first * 0, zeros1_group)
        shift1 = None if offset1_at is None else part(offset1_at, first * 0, offsets1_group)
    a = tl.zeros([COLUMNS, BYTES if ROWS == 1 else ROWS], tl.float32)
    b = a
    all_z = tl.zeros([1, BYTES if ROWS == 1 else ROWS], tl.float32)
    squares = tl.zeros([ROWS, DEPTH], tl.float32)
    for place in tl.range(first, last, BYTES, num_stages=STAGES):
        deep = place * EACH + steps
        z, squares = rows_of_x(
            x_at,
            row,
            rows,
            deep,
            n,
            s,
            m,
            rest,
            squares,
            gain,
            offset,
            norm_bias,
            alpha,
            NORM,
            STATISTICS,
        )
        odd = z
        if EACH == 2:
            z, odd = tl.split(tl.reshape(z, [ROWS, BYTES, 2]))
        sum_of_z = None
        if SUM_OF_Z:
            sum_of_z = z.to(tl.float32) + odd.to(tl.float32) if EACH == 2 else z.to(tl.float32)
            if ROWS > 1:
                sum_of_z = tl.sum(sum_of_z, axis=1)[None, :]
            all_z += sum_of_z
        a = step(
            w_at,
            scale_at,
            scales_group,
            zero_at,
            zeros_group,
            offset_at,
            offsets_group,
            place,
            taken,
            z,
            odd,
            sum_of_z,
            zero,
            a,
            PRECISION,
            FORMAT,
            ZEROS,
            GROUP,
            DEPTH,
            BYTES,
        )
        if ACTIVATION is not None:
            b = step(
                w1_at,
                scale1_at,
                scales1_group,
                zero1_at,
                zeros1_group,
                offset1_at,
                offsets1_group,
                place,
                taken,
                z,
                odd,
                sum_of_z,
                zero1,
                b,
                PRECISION,
                FORMAT,
                ZEROS,
                GROUP,
                DEPTH,
                BYTES,
            )
    if ROWS == 1:
        a = tl.sum(a, axis=1)[:, None]
        b = tl.sum(b, axis=1)[:, None]
        all_z = tl.sum(all_z, axis=1)[:, None]
    if GROUP == 0:
        a = scaled_by_group(a, all_z, scale, zero, shift, ZEROS)
        if ACTIVATION is not None:
            b = scaled_by_group(b, all_z, scale1, zero1, shift1, ZEROS)
    squares = tl.sum(squares, axis=1)
    if SPLITS > 1:
        blocks = tl.num_programs(0)
        at_part = (tl.program_id(1) * blocks + whole).to(tl.int64)
        kept(partial, partial_squares, a, b, squares, at_part, ACTIVATION, STATISTICS)
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
