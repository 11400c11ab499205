"""Scales and gains that go into the tables of rotary embeddings (E9, E10).

A rotation by halves, `rope(u) = u ⊙ cos + turn(u) ⊙ sin` with `turn([a, b]) = [−b, a]`, is linear,
so a factor on u may as well be on the tables, which all heads share.
u: [.., T, h]; cos, sin: [T, h], with an even h; in any floating dtype.
Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _halves(u: Tensor) -> tuple[Tensor, Tensor]:
    if u.shape[-1] % 2:
        raise ValueError(f"{u.shape[-1]} channels are no two halves: a head has an even number")
    first, second = u.chunk(2, -1)
    return first, second


def _swap(u: Tensor) -> Tensor:
    first, second = _halves(u)
    return torch.cat([second, first], -1)


def _turn(u: Tensor) -> Tensor:
    first, second = _halves(u)
    return torch.cat([-second, first], -1)


def rope(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`u ⊙ cos + turn(u) ⊙ sin`: the rotation itself.

    u: [.., T, h], cos and sin: [T, h], of one floating dtype; returns [.., T, h] in it. Raises
    ValueError for an odd h, RuntimeError where shapes do not fit.
    """
    return u * cos + _turn(u) * sin


def scaled_rope_tables(
    cos: Tensor, sin: Tensor, scale: Tensor, head_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """E9: `rope(s · u; cos, sin) = rope(u; s · cos, s · sin)`: the scale of the norm before it.

    cos and sin: [T, h]; scale: [.., T, 1], one number per token for all heads; `head_scale` is
    1/√h, for one of q and k. Returns tables [.., T, h] in the floating dtype of both. Exact where q
    and k have no bias. Raises RuntimeError where shapes do not fit.
    """
    factor = scale * head_scale
    return cos * factor, sin * factor


def shared_gain_tables(cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """E10: `rope(g ⊙ u; cos, sin) = rope(u; g ⊙ cos, swap(g) ⊙ sin)`: a QK-norm's gain.

    cos and sin: [T, h]; gain: [h], shared by all heads; returns tables [T, h] in the floating dtype
    of both. Channels that are not rotated (cos 1, sin 0) take it as well, and may take the product
    `g_q ⊙ g_k` on one side: `Σ (g_q u)(g_k v) = Σ (g_q g_k) u v`. Raises ValueError for an odd h,
    RuntimeError where shapes do not fit.
    """
    return cos * gain, sin * _swap(gain)
