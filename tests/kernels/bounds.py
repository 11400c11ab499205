"""How far a kernel may be from the float64 reference: derived, and nowhere else.

u unit roundoff, n width, z the normalized row, a and b products before an activation.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels import norms, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import policy
from flashnorm.kernels.cpu.library import Library, load
from flashnorm.kernels.weights import Weight
from flashnorm.verification.bounds import CONFIDENCE, unit_roundoff
from tests.kernels import packed

# Roundings of one element outside of sums (scale, gain, norm bias, bias, and tanh's own few).
STEPS = 8
# Largest slope of the activations: GELU's 1.13.
SLOPE = 1.13


def wide(call: Call) -> Call:
    """The same call in float64, packed weights as what they stand for."""

    def widen(value: object) -> object:
        if isinstance(value, Weight):
            return value.dequantized()
        if isinstance(value, Tensor):
            return value.double()
        return [widen(v) for v in value] if isinstance(value, (list, tuple)) else value

    return Call(*[widen(value) for value in call])


def products(
    call: Call, fused: bool, first: bool | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """z W_iᵀ + c_i in float64, and how far each element of it may be off.

    A sum of n products in float32 is off by `λ √n u32 Σ|z w|` (Higham and Mary 2019), and so is
    every statistic, relatively; the mean of a LayerNorm is off by that much of the deviation, which
    is 1 in z: hence `|z| + 1`. Where a library multiplies, z was rounded to the dtype of x first,
    and the products afterwards; in tiles z alone was, unless x is multiplied as it came. `first`
    says whether z was, where it is not the CPU's kernels that are asked.
    """
    exact, n = wide(call), call.x.shape[-1]
    plain = exact._replace(activation=None, output_residual=None)
    eye = torch.eye(n, dtype=torch.float64)
    z = reference.norm_linear(plain._replace(weights=[eye], biases=None))[0].abs()
    if call.norm.centers:
        z = z + (1 if exact.gain is None else (exact.gain_offset + exact.gain).abs())
    if exact.norm_bias is not None:
        z = z + exact.norm_bias.abs()
    u, half = unit_roundoff(torch.float32), 0.0 if fused else unit_roundoff(call.x.dtype)
    if first is None:
        first = not fused or rounds_first(call)
    relative = (2 * CONFIDENCE * sqrt(n) + STEPS) * u
    relative += unit_roundoff(call.x.dtype) if first else 0.0
    values = reference.norm_linear(plain)
    # Below float32's normal numbers every addition rounds by up to half of the smallest one.
    smallest, errors = n * 2.0**-149, []
    for i, (w, value) in enumerate(zip(call.weights, values, strict=True)):
        bias = exact.biases[i].abs() if exact.biases and exact.biases[i] is not None else 0
        # A packed weight is made of parts, each of which is rounded, and of which w is the sum.
        size = packed.sizes(w) if isinstance(w, Weight) else w.double().abs()
        apart = whole_numbers(z, w) @ size.T if isinstance(w, Weight) and in_bytes(call, w) else 0
        errors.append(relative * (z @ size.T + bias) + half * value.abs() + smallest + apart)
    return values, errors


def in_bytes(call: Call, weight: Weight) -> bool:
    """Whether the one row of a call is taken apart into bytes (csrc/whole_numbers.h)."""
    library = load()
    if not isinstance(library, Library) or library.isa not in ("amx", "avx512bf16", "avx512vnni"):
        return False
    return call.x.numel() == call.x.shape[-1] and packed.bits_of_levels(weight) > 0


def whole_numbers(z: Tensor, weight: Weight) -> Tensor:
    """How far a row may be off: half a unit, of which the largest of 32 has 2²² or half as many."""
    parts = F.pad(z, (0, -z.shape[-1] % 32)).unflatten(-1, (-1, 32))
    largest = parts.amax(-1, keepdim=True).expand(parts.shape)
    unit = 1.01 * 2.0 ** (-21 if packed.bits_of_levels(weight) == 8 else -22)
    return unit / 2 * largest.flatten(-2)[..., : z.shape[-1]]


def rounds_first(call: Call) -> bool:
    """Whether rows are multiplied as bf16, and normalized before that and not after."""
    x = call.x
    if not policy.rounds_first(call):
        return False
    squares = x.double().square().mean(-1)
    ordinary = (squares > 1e-20) & (squares < 1e36)
    plain = (
        not (call.norm.centers or call.norm.learns_alpha)
        and call.gain is None
        and call.norm_bias is None
    )
    return not plain or (call.norm is norms.RMS and not bool(ordinary.all()))


def bound(
    call: Call, fused: bool = True, first: bool | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The float64 results, and per element how far a correct kernel may be from them.

    `act(a) b` moves by `slope δa (|b| + δb) + |act(a)| δb` and the few roundings of act itself.
    All ends in one rounding to the dtype of x; behind a library's matmul in two.
    """
    values, errors = products(call, fused, first)
    u, last = unit_roundoff(torch.float32), unit_roundoff(call.x.dtype)
    if call.activation is not None:
        (a, b), (da, db) = values, errors
        act = reference.ACTIVATIONS[call.activation](a)
        moved = SLOPE * da * (b.abs() + db) + act.abs() * db + STEPS * u * (a * b).abs()
        values, errors = [act * b], [moved]
    if call.output_residual is not None:
        if not fused:
            errors[0] = errors[0] + last * values[0].abs()
        values = [values[0] + call.output_residual.double()]
    small = torch.finfo(call.x.dtype).smallest_normal * 2 * last
    return values, [
        (1 + 2 * last) * e + (last + STEPS * u) * v.abs() + small
        for v, e in zip(values, errors, strict=True)
    ]


def assert_close(
    call: Call,
    found: list[Tensor],
    fused: bool = True,
    what: object = "",
    first: bool | None = None,
    alike: bool = True,
) -> None:
    """Every element within its bound; NaN and infinities where the reference has them.

    alike: and the same of them. (∞ and −∞ may meet before or after a sum: ∞ · 0 is no ∞.)
    """
    values, bounds = bound(call, fused, first)
    assert len(found) == len(values)
    for y, value, limit in zip(found, values, bounds, strict=True):
        assert y.dtype == call.x.dtype, what
        assert y.shape == value.shape, what
        representable = value.abs() + limit < torch.finfo(y.dtype).max
        special = ~value.isfinite()
        same = (y.double() == value) | (y.isnan() & value.isnan()) if alike else ~y.isfinite()
        assert same[special].all(), (what, y, value)
        excess = ((y.double() - value).abs() - limit)[representable & ~special]
        assert (excess <= 0).all(), (what, float(excess.max()))
