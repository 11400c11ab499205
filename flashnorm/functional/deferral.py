"""Norm + linear with the scale per row applied as late as it may be (E4, E5, E6, E8, E11, E12).

x: [.., n] raw, not normalized; weights are [out, in] and have absorbed the gain (E1). All is
computed in the dtype of x, any floating one, which the weights have too; float64 makes the proof.
Shapes and dtypes that do not fit raise the RuntimeError of torch's own operations.
Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def row_scale(x: Tensor, eps: float) -> Tensor:
    """`s = 1 / sqrt(mean(x²) + ε)`, one number per row.

    x: [.., n] in any floating dtype; returns [.., 1] in it. Raises RuntimeError for integers.
    """
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def deferred_linear(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """E4: `rms(x) W*ᵀ + c = s ⊙ (x W*ᵀ) + c`.

    x: [.., n], weight: [k, n], bias: [k], of one floating dtype; returns [.., k] in it. Raises
    RuntimeError where shapes or dtypes do not fit.
    """
    y = row_scale(x, eps) * F.linear(x, weight)
    return y if bias is None else y + bias


def deferred_layer_linear(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """E5: `layer(x) W*ᵀ + c = s ⊙ (x W*ᵀ − μ u) + c`, with `u = W* 1` and `μ = mean(x)`.

    x: [.., n], weight: [k, n], bias: [k], of one floating dtype; returns [.., k] in it. u depends
    on the weight alone. Raises RuntimeError where shapes or dtypes do not fit.
    """
    mean = x.mean(-1, keepdim=True)
    s = torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps)
    y = s * (F.linear(x, weight) - mean * weight.sum(-1))
    return y if bias is None else y + bias


def dyt_linear(x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor) -> Tensor:
    """E6: `(tanh(αx)·γ + β) Wᵀ + c = tanh(αx) W*ᵀ + c*`. weight: [k, n], bias: [k], alpha: [1]."""
    return F.linear(torch.tanh(alpha * x), weight, bias)


def sum_gain(gain: Tensor) -> Tensor:
    """E11: `g* = √n g`, for a scale of the sum of squares instead of their mean.

    gain: [n], any floating dtype; returns [n] in it. Raises nothing.
    """
    return gain * gain.shape[-1] ** 0.5


def sum_scale(x: Tensor, eps: float) -> Tensor:
    """E11: `s = 1 / sqrt(Σx² + nε)`, which with `sum_gain` is the same norm.

    x: [.., n] in any floating dtype; returns [.., 1] in it. Raises nothing.
    """
    return torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + x.shape[-1] * eps)


def relu_ffn(x: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    """E8: `relu(s·a) = s·relu(a)` for s > 0, so one scale at the end serves the whole network.

    x: [.., n], up: [m, n], down: [n, m], neither with a bias before the scale, of one floating
    dtype; returns [.., n] in it. Raises RuntimeError where shapes or dtypes do not fit.
    """
    return row_scale(x, eps) * F.linear(torch.relu(F.linear(x, up)), down)


def reglu(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    act: Callable[[Tensor], Tensor] = torch.relu,
) -> Tensor:
    """E8: two factors of s give `s² = 1 / (mean(x²) + ε)`, no root, after the down projection.

    x: [.., n], gate, up: [m, n], down: [n, m], of one floating dtype; returns [.., n] in it. `act`
    is relu, or the identity for a bilinear network; with another one it is wrong. Raises
    RuntimeError where shapes or dtypes do not fit.
    """
    inverse_square = x.pow(2).mean(-1, keepdim=True) + eps
    return F.linear(act(F.linear(x, gate)) * F.linear(x, up), down) / inverse_square


def glu(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    act: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """E12: `act(s·a) ⊙ (s·b) = s ⊙ (act(s·a) ⊙ b)`: the linear half's scale waits for the end.

    x: [.., n], gate, up: [m, n], down: [n, m] without a bias (or it is added afterwards), of one
    floating dtype; returns [.., n] in it. `act` is any function of each element. Raises
    RuntimeError where shapes or dtypes do not fit.
    """
    s = row_scale(x, eps)
    return s * F.linear(act(s * F.linear(x, gate)) * F.linear(x, up), down)
