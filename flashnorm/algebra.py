"""The identities of FlashNorm (arXiv 2407.09577), one function each.

Nothing else in the package multiplies a weight by a gain. Weights are [out, in] = [k, n] as in
`torch.nn.Linear`; other layouts name the axis that carries the norm's features. Everything works
block by block, so that no second copy of a large weight is ever made, and what is written does not
depend on the blocks: elements are computed one by one, and sums have one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from flashnorm.errors import FoldError
from flashnorm.plan import Gain, Span

BLOCK_ELEMENTS = 1 << 22


def effective_gain(parameter: Tensor, gain: Gain) -> Tensor:
    """The gain g = offset + scale · p that the model multiplies by, flat: [numel].

    Plain gains are returned in float32, where the product of two bf16 or two fp16 numbers is
    exact; any other convention is evaluated once in float64. A float64 parameter stays float64.
    """
    flat = parameter.detach().reshape(-1)
    if (gain.offset, gain.scale) == (0.0, 1.0):
        return flat.to(torch.promote_types(flat.dtype, torch.float32))
    return gain.offset + gain.scale * flat.to(torch.float64)


def fold_gain_(weight: Tensor, gain: Tensor, axis: int, spans: Iterable[Span]) -> None:
    """E1, in place: `norm(x)·g Wᵀ = norm(x) W*ᵀ` with `W* = W diag(g)` over the columns of `spans`.

    weight: any shape, a floating dtype; gain: [m] as `effective_gain` returns it. The product is
    taken in the wider of the two dtypes and rounded once to the weight's.
    """
    for block, factor in _blocks(weight, gain, axis, spans):
        wide = block.to(factor.dtype)  # the block itself where that is its dtype
        wide *= factor
        block.copy_(wide)


def unfold_gain_(weight: Tensor, gain: Tensor, axis: int, spans: Iterable[Span]) -> None:
    """The inverse of `fold_gain_`, `W = W* diag(g)⁻¹`, within one rounding; g must have no zero."""
    for block, factor in _blocks(weight, gain, axis, spans):
        block.copy_(block.to(factor.dtype) / factor)


def identity_gain_(parameter: Tensor, gain: Gain) -> None:
    """Set the parameter, in place, to the value at which the effective gain is exactly one."""
    parameter.fill_(gain.identity)


def bias_product(weight: Tensor, norm_bias: Tensor, axis: int, spans: Iterable[Span]) -> Tensor:
    """E2: `W β`, what a norm's bias adds to a reader's, in float64.

    weight: a matrix as it was before E1, whose `axis` meets the norm's features; norm_bias: [m],
    the norm's bias β. Returns [k], one element per position of the other axis.
    """
    total = torch.zeros(weight.shape[1 - axis], dtype=torch.float64, device=weight.device)
    beta = norm_bias.detach().reshape(-1).to(torch.float64)
    for span in spans:
        part = weight.detach().narrow(axis, span.start, span.length)
        part = part if axis == 1 else part.t()
        total += matrix_vector(part, beta[span.gain_start : span.gain_start + span.length])
    return total


def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """`M v` in float64, the same bits on every machine. matrix: [k, n], vector: [n] in float64.

    A library's product adds in an order of its own, by processor, threads and number of rows.
    """
    rows = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    return torch.cat([_sum_away(block * vector) for block in matrix.split(rows)])


def _sum_away(values: Tensor) -> Tensor:
    """The sum over the last axis, pairwise: its order depends on the length of that axis alone.

    values are written over.
    """
    left = values.shape[-1]
    if left == 0:
        return values.new_zeros(values.shape[:-1])
    while left > 1:
        half = left // 2
        values[..., :half] += values[..., left - half : left]
        left -= half
    return values[..., 0].clone()  # a view would keep all of them


def fold_bias_(bias: Tensor, product: Tensor) -> None:
    """E2, in place: `c* = c + W β`; `product` is the sum of what `bias_product` gave."""
    bias.copy_(bias.to(torch.float64) + product)


def carry_bias_(norm_bias: Tensor, gain: Tensor) -> None:
    """E13, in place: `z·g + β = (z + β/g)·g`, so a bias without a slot in its readers stays as β/g.

    norm_bias: the bias β, as many elements as gain: [m], none of them zero where β is not.
    """
    flat = norm_bias.reshape(-1).to(torch.float64)
    quotient = torch.where(flat == 0, flat, flat / gain.to(torch.float64))
    norm_bias.copy_(quotient.view(norm_bias.shape))


def can_carry(norm_bias: Tensor, gain: Tensor) -> bool:
    """Whether β/g is finite in the dtype of β, and 0 where β is."""
    kept = norm_bias.detach().clone()
    carry_bias_(kept, gain)
    return bool(torch.isfinite(kept).all())


def center_(weight: Tensor, axis: int) -> Tensor:
    """E3, in place: `V* = V − mean(V)` over `axis`, the one along the residual's features.

    The mean is taken in float64 and the difference rounded once. Returns the mean, `axis` kept.
    """
    rows = weight.movedim(axis, -1)
    rows = rows.unsqueeze(0) if rows.ndim == 1 else rows
    means = []
    for block in rows.split(max(1, BLOCK_ELEMENTS * rows.shape[0] // max(1, rows.numel()))):
        wide = block.to(torch.float64)
        means.append(_sum_away(wide.clone()).unsqueeze(-1) / wide.shape[-1])
        block.copy_(wide - means[-1])
    mean = torch.cat(means)
    return mean[0] if weight.ndim == 1 else mean.movedim(-1, axis)


def uncenter_(weight: Tensor, mean: Tensor) -> None:
    """The inverse of `center_`, within one rounding; mean: what `center_` returned."""
    weight.copy_(weight.to(torch.float64) + mean)


def is_identity(parameter: Tensor, gain: Gain) -> bool:
    """Whether every element of the effective gain is exactly one."""
    return bool((effective_gain(parameter, gain) == 1).all())


def check_fold(
    name: str,
    weight: Tensor,
    gain_name: str,
    gain: Tensor,
    consumer_axis: int,
    spans: Iterable[Span],
) -> int:
    """Raise FoldError where `fold_gain_` would leave the range of the weight's dtype.

    Returns how many non-zero normal elements would become subnormal or zero in that dtype: they
    lose relative precision, which is worth a warning but moves no output by more than
    `tiny · |x|`. Elements that are not finite before are not held against the fold.
    """
    if not bool(torch.isfinite(gain).all()):
        raise FoldError(
            f"{gain_name}: the gain holds NaN or infinity, so it cannot be folded into "
            f"{name}; repair the checkpoint first"
        )
    low, high = _safe_range(weight.dtype, gain)
    lost = 0
    for block, factor in _blocks(weight, gain, consumer_axis, spans):
        if _stays_normal(block, low, high):
            continue
        after = (block.to(factor.dtype) * factor).to(weight.dtype)
        if _overflows(block, after):
            raise FoldError(
                f"{name}: folding the gain {gain_name} (largest magnitude "
                f"{float(gain.abs().max()):.4g}) into it overflows {weight.dtype}; convert the "
                "checkpoint to bfloat16 or float32 first"
            )
        lost += _lost(block, after, factor)
    return lost


# Magnitudes of floating-point numbers are ordered as the integers of their bits are, and integer
# operations on bf16 and fp16 are many times faster than the same question asked of the values.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _magnitude(values: Tensor) -> Tensor:
    """The bits of |values| as integers; infinity and NaN are above every finite number."""
    integer = _INTEGERS[values.element_size()]
    return values.detach().view(integer) & torch.iinfo(integer).max


@lru_cache(maxsize=4096)
def _bits(value: float, dtype: torch.dtype) -> int:
    return int(_magnitude(torch.tensor(value, dtype=dtype)))


def _safe_range(dtype: torch.dtype, gain: Tensor) -> tuple[int, int]:
    """Bits of the magnitudes between which no product with the gain, or with 1, leaves the normal
    range of `dtype`; a factor of two covers every rounding on the way."""
    info, magnitude = torch.finfo(dtype), gain.abs()
    smallest = float(torch.where(magnitude > 0, magnitude, 1.0).amin()) if gain.numel() else 1.0
    largest = float(magnitude.amax()) if gain.numel() else 1.0
    low, high = 2 * info.tiny / min(1.0, smallest), info.max / max(1.0, largest) / 2
    return _bits(low, dtype), _bits(high, dtype)


def _stays_normal(block: Tensor, low: int, high: int) -> bool:
    """Whether every element is zero, subnormal already, or within the safe range."""
    bits = _magnitude(block)
    if int(bits.amax()) > high:
        return False
    tiny = _bits(torch.finfo(block.dtype).tiny, block.dtype)
    bits -= tiny
    bits &= torch.iinfo(bits.dtype).max  # what lies below tiny wraps to the top
    return int(bits.amin()) >= low - tiny


def _overflows(before: Tensor, after: Tensor) -> bool:
    largest, after_bits = _bits(torch.finfo(after.dtype).max, after.dtype), _magnitude(after)
    if int(after_bits.amax()) <= largest:
        return False
    return bool(((_magnitude(before) <= largest) & (after_bits > largest)).any())


def _lost(before: Tensor, after: Tensor, factor: Tensor) -> int:
    """How many normal elements became subnormal or zero, but not by a gain of zero."""
    tiny = _bits(torch.finfo(after.dtype).tiny, after.dtype)
    lost = ~(_magnitude(before) - tiny) & (_magnitude(after) - tiny)  # negative where it happened
    if int(lost.amin()) >= 0:
        return 0
    return int(torch.count_nonzero((lost < 0) & (factor != 0)))


def _blocks(
    weight: Tensor, gain: Tensor, axis: int, spans: Iterable[Span]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of `weight` along its first axis, each with the broadcastable factor that meets it."""
    wide = torch.promote_types(weight.dtype, gain.dtype)
    factor = torch.ones(weight.shape[axis], dtype=wide, device=weight.device)
    for span in spans:
        part = gain[span.gain_start : span.gain_start + span.length]
        factor[span.start : span.start + span.length] = part
    shape = [1] * weight.ndim
    shape[axis] = -1
    factor = factor.view(shape)
    if weight.numel() == 0:
        return
    rows = max(1, BLOCK_ELEMENTS * weight.shape[0] // weight.numel())
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        yield block, factor[start : start + rows] if axis == 0 else factor


def subnormal_warning(lost: int) -> str:
    """The words for what `check_fold` counted."""
    return (
        f"{lost} weights became subnormal when gains near zero were folded into them; their "
        "relative precision is lower, their absolute error below the dtype's smallest normal number"
    )
