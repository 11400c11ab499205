"""Packed weights in registers: what is stored becomes levels, and products of those get a scale.

    W = (q − zero) · scale + offset

Levels q, and q less an integer zero, are numbers of bfloat16 and float16: products with x are those
of the matrix units and lose nothing. Scale and offset meet sums of a group, in float32.
"""

import triton
import triton.language as tl

from flashnorm.kernels.gpu.device.parts import narrow, product

NIBBLE_ZERO = tl.constexpr(8.0)


@triton.jit
def fp8_level(raw):
    """float8_e4m3fn, given as it lies in a byte, in float32: for GPUs that do not convert it.

    Its exponent and mantissa are those of a float32 that is 2¹²⁰ times smaller.
    """
    bits = raw.to(tl.int32)
    size = ((bits & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    size = tl.where((bits & 127) == 127, float("nan"), size)
    return tl.where(bits > 127, -size, size)


@triton.jit
def nibble_level(four):
    """0 .. 15, int32, in float32 by its bits: 2²³ + q is exact, and a conversion takes longer."""
    return (four | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def first_levels(raw, FORMAT: tl.constexpr):
    """q of each byte in float32; of two in a byte the one of the even feature."""
    if FORMAT == "int4":
        q = nibble_level(raw.to(tl.int32) & 15)
    elif FORMAT == "fp8" and raw.dtype == tl.uint8:
        q = fp8_level(raw)
    else:
        q = raw.to(tl.float32)
    return q


@triton.jit
def summed(q, z, total, PRECISION: tl.constexpr):
    """total + q zᵀ: by element where z is one row, in float32; else by the matrix units.

    They are given z first: as their second operand levels take half of the instructions, and are
    copied 16 bytes at a time on capability 9 too. float32 takes fewer registers the other way.
    """
    if z.shape[0] == 1:
        total += q * z
    elif z.dtype == tl.float32:
        total = product(q, tl.trans(z), total, PRECISION)
    else:
        levels = tl.trans(narrow(q, z.dtype))
        total = tl.trans(product(z, levels, tl.trans(total), PRECISION))
    return total


@triton.jit
def part(at, group, step):
    """Numbers of one group for columns, in float32: [columns, 1]. at: pointers to group 0."""
    return tl.load(at + group.to(tl.int64) * step).to(tl.float32)[:, None]


@triton.jit
def centered(q, zero, FORMAT: tl.constexpr, ZEROS: tl.constexpr):
    """q less what can be taken off it without a rounding that a sum would see."""
    if ZEROS == "each":
        q -= zero
    elif ZEROS is None and FORMAT == "int4":
        q -= NIBBLE_ZERO
    return q


@triton.jit
def terms(
    w_at,
    place,
    taken,
    z,
    odd,
    zero,
    total,
    PRECISION: tl.constexpr,
    FORMAT: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """total + Σ (q − zero) z of BYTES bytes of each column from `place`; z of odd features: odd."""
    at = place + tl.arange(0, BYTES)
    raw = tl.load(w_at[:, None] + at[None, :], mask=(at < taken)[None, :], other=0.0)
    q = centered(first_levels(raw, FORMAT), zero, FORMAT, ZEROS)
    total = summed(q, z, total, PRECISION)
    if FORMAT == "int4":
        q = nibble_level(raw.to(tl.int32) >> 4)
        total = summed(centered(q, zero, FORMAT, ZEROS), odd, total, PRECISION)
    return total


@triton.jit
def scaled_by_group(sums, sum_of_z, scale, zero, offset, ZEROS: tl.constexpr):
    """`(Σ q z − zero Σ z) · scale + offset Σ z`; sums and their parts broadcast to each other."""
    if ZEROS == "sum":
        sums -= zero * sum_of_z
    if scale is not None:
        sums *= scale
    if offset is not None:
        sums += offset * sum_of_z
    return sums
