"""Attention of one token: random cases, and how far a kernel may be from float64 (derived)."""

from __future__ import annotations

from math import sqrt

import torch

from flashnorm.verification.bounds import CONFIDENCE, unit_roundoff
from tests.kernels.bounds import STEPS
from tests.kernels.cases import random

INF = float("inf")
LENGTHS = (1, 3, 17, 64, 1000)
WIDTHS = ((64, 64), (33, 7), (1, 1), (80, 96), (128, 130))  # of k, of v
GROUPS = ((1, 1), (3, 3), (6, 2), (8, 1), (5, 1))  # heads, kv heads
MASKS = ("none", "bool", "added")
# On a GPU half precision multiplies weights by values as two numbers (`plus_weighted`). What is
# lost of a weight is that of the second one; float16 has no numbers between multiples of 2⁻²⁴, and
# the largest weight is 2¹⁴ there. One head, and float32, lose nothing.
LOST = {
    torch.float32: {},
    torch.bfloat16: {"rounded": 1.25 * 2.0**-16},
    torch.float16: {"rounded": 1.25 * 2.0**-20, "lost": 2.0**-39},
}


def made(batch, heads, length, widths, dtype, scale=1.0):
    """q, k and v; the scores have a spread of `scale`."""
    (heads, groups), (width, value_width) = heads, widths
    return (
        random(batch, heads, 1, width, dtype=dtype, scale=scale, seed=1),
        random(batch, groups, length, width, dtype=dtype, seed=2),
        random(batch, groups, length, value_width, dtype=dtype, seed=3),
    )


def mask_of(kind, batch, length, dtype):
    """Padding in front and behind, holes between; every sequence sees something."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(batch + length)
    seen = torch.rand(batch, 1, 1, length, generator=generator) > 0.4
    seen[..., : length // 4] = False
    seen[..., length - length // 3 :] = False
    seen[..., length // 2] = True
    if kind == "bool":
        return seen
    bias = random(batch, 1, 1, length, dtype=torch.float32, seed=4)
    return bias.masked_fill(~seen, -INF).to(dtype)


def bound(q, k, v, scale, mask, rounded=0.0, lost=0.0):
    """The float64 results [B, 1, H, Dv], and per element how far a correct kernel may be from them.

    A score is off by `δ = λ √D u scale Σ|q k|` and a few roundings of what it is added to and of
    how far it is below the largest. A weight then moves by the factor e^±δ, the exponential's own
    few roundings included, and by the same of all weights through their sum; sums over T weights
    round by `λ √T u`, and the result once to the dtype of q.

    rounded: of a weight, by which it is off before it meets its value; lost: the same of the
    largest weight.
    """
    q, k, v = q.double(), k.double(), v.double()
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    scores, sizes = scale * (q @ k.mT), abs(scale) * (q.abs() @ k.abs().mT)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -INF)
    elif mask is not None:
        scores, sizes = scores + mask.double(), sizes + mask.double().abs()
    weights = scores.softmax(-1)
    u = unit_roundoff(torch.float32)
    below = (scores.amax(-1, keepdim=True) - scores).abs()
    delta = u * (CONFIDENCE * sqrt(q.shape[3]) * sizes + STEPS * (sizes + below) + STEPS)
    moved = weights * torch.expm1(delta).where(weights > 0, 0)
    total = moved.sum(-1, keepdim=True)
    relative = (2 * CONFIDENCE * sqrt(k.shape[2]) + STEPS) * u
    value = weights @ v
    off = rounded * weights + lost * weights.amax(-1, keepdim=True).where(weights > 0, 0)
    error = (moved + relative * weights + total * weights + off) @ v.abs()
    return value.transpose(1, 2), ((1 + 2 * total) * error).transpose(1, 2)


def assert_close(q, k, v, scale, mask, found, what=(), rounded=0.0, lost=0.0):
    value, error = bound(q, k, v, scale, mask, rounded, lost)
    u, last = unit_roundoff(torch.float32), unit_roundoff(q.dtype)
    limit = (1 + 2 * last) * error + (last + STEPS * u) * value.abs()
    limit = limit + torch.finfo(q.dtype).smallest_normal * 2 * last
    assert found.dtype == q.dtype
    assert found.shape == value.shape
    assert found.is_contiguous()
    assert bool(((found.double() - value).abs() <= limit).all()), what
