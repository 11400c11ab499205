"""The formulas of training: what a norm saves per row, its values again from that, its gradients.

    x̂ = s ⊙ (x − μ)  (DyT: tanh(αx), none: x),   z = x̂ ⊙ (offset + g) + β

All in float32 (float64 for float64), and in torch's own differentiable operations, on any device.
Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels.norms import NormKind, Statistics

aten = torch.ops.aten


class Form(NamedTuple):
    """Which norm, its epsilon, and what is added to its gain."""

    norm: NormKind
    eps: float = 0.0
    offset: float = 0.0


class Saved(NamedTuple):
    """What z is made of: x [.., n], s and μ [.., 1] where the norm has them, its parameters."""

    x: Tensor
    scale: Tensor | None
    mean: Tensor | None
    gain: Tensor | None
    bias: Tensor | None
    alpha: Tensor | None


def widen(x: Tensor) -> Tensor:
    """x in the dtype that norms are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def statistics(form: Form, x: Tensor) -> Statistics:
    """(s, μ): `s = rsqrt(mean(x²) + ε)`, or for a LayerNorm `rsqrt(var(x) + ε)` and the mean."""
    return form.norm.statistics(widen(x), form.eps)


def current(form: Form, saved: Saved) -> Saved:
    """The same with statistics that a second derivative can be taken of, where one is wanted."""
    if not torch.is_grad_enabled() or saved.scale is None:
        return saved
    scale, mean = statistics(form, saved.x)
    return saved._replace(scale=scale, mean=mean)


def hat(form: Form, saved: Saved) -> Tensor:
    """x̂, wide."""
    return form.norm.hat(widen(saved.x), saved.scale, saved.mean, saved.alpha)


def normalized(form: Form, saved: Saved) -> Tensor:
    """z in the dtype of x, rounded once."""
    z = hat(form, saved)
    if saved.gain is not None:
        z = z * (form.offset + saved.gain.to(z.dtype))
    if saved.bias is not None:
        z = z + saved.bias.to(z.dtype)
    return z.to(saved.x.dtype)


class Wanted(NamedTuple):
    """Which gradients of a norm are wanted."""

    x: bool
    gain: bool
    bias: bool
    alpha: bool


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def backward(form: Form, saved: Saved, t: Tensor, wanted: Wanted) -> Gradients:
    """(dx, dg, dβ, dα) from t = dz, in their tensors' dtypes; all is [.., n] but dα.

    `dβ = Σ t`, `dg = Σ t ⊙ x̂`, `dx̂ = t ⊙ (offset + g)`; sums are over the rows.
    """
    norm, (x, scale, _, gain, bias, alpha) = form.norm, saved
    wide = widen(t)
    hats = hat(form, saved) if wanted.x or wanted.gain or wanted.alpha else wide
    dgain = dbias = dx = dalpha = None
    if wanted.gain and gain is not None:
        dgain = _over_rows(wide * hats).to(gain.dtype)
    if wanted.bias and bias is not None:
        dbias = _over_rows(wide).to(bias.dtype)
    if wanted.x or wanted.alpha:
        if gain is not None:
            wide = wide * (form.offset + gain.to(wide.dtype))
        inner = norm.inner(wide, hats)
        if wanted.alpha and alpha is not None and norm.learns_alpha:
            dalpha = (inner * x).sum().to(alpha.dtype).reshape(alpha.shape)
        dx = norm.backward(inner, hats, scale, alpha).to(x.dtype) if wanted.x else None
    return dx, dgain, dbias, dalpha


def _over_rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).sum(0)


class Activation(NamedTuple):
    """An activation, and its gradient from (the gradient after it, what it was applied to)."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "identity": Activation(lambda a: a, lambda d, a: d),
    "relu": Activation(F.relu, lambda d, a: aten.threshold_backward(d, a, 0)),
    "silu": Activation(F.silu, lambda d, a: aten.silu_backward(d, a)),
    "gelu": Activation(F.gelu, lambda d, a: aten.gelu_backward(d, a)),
    "gelu_tanh": Activation(
        lambda a: F.gelu(a, approximate="tanh"),
        lambda d, a: aten.gelu_backward(d, a, approximate="tanh"),
    ),
}


def through_activation(activation: str, d: Tensor, a: Tensor) -> Tensor:
    """da from `d`, the gradient after the activation; not all of aten's own have a second one."""
    if torch.is_grad_enabled():
        return torch.func.vjp(ACTIVATIONS[activation].value, a)[1](d)[0]
    return ACTIVATIONS[activation].gradient(d, a)


def gated(activation: str, a: Tensor, b: Tensor) -> Tensor:
    """`act(a) ⊙ b`."""
    return ACTIVATIONS[activation].value(a) * b
