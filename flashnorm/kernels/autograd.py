"""Gradients of norm + linear that need x and one number per row; z is made again, never saved.

    y_i = z W_iᵀ + c_i:   dW_i = dy_iᵀ z,   dc_i = Σ dy_i,   dz = Σ_i dy_i W_i   (E15)

`Products` is that as one operation with its norm; `Norm` and `Linear` are the same in two parts,
for readers that are modules of their own; `Gate` is `act(a) ⊙ b`. A second derivative is taken
through the formulas themselves, whose statistics are then computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from flashnorm.kernels import gradient
from flashnorm.kernels.call import Call
from flashnorm.kernels.gradient import Form, Saved, Wanted

Forward = Callable[[Call], list[Tensor]]


def run(call: Call, forward: Forward) -> list[Tensor]:
    """The results of a call, with a gradient; `forward` computes those of a call without one.

    Saved are x, s (for a LayerNorm μ too) and, with an activation, the gate's and the up half's
    products: making these again would cost two of the three matmuls of a feed-forward network.
    """
    call = call.added()
    plain = call._replace(activation=None, output_residual=None)
    x, weights, biases, norm, eps, gain, offset, norm_bias, alpha = plain[:9]
    readers = (*weights, *(biases or [None] * len(weights)))
    form = Form(norm, eps, offset)
    found = Products.apply(forward, form, x, gain, norm_bias, alpha, *readers)
    if call.activation is not None:
        found = (Gate.apply(call.activation, *found),)
    if call.output_residual is not None:
        found = (found[0] + call.output_residual.to(x.dtype),)
    return list(found)


class Products(Function):
    """`[z W_iᵀ + c_i]`: saves x, s, μ and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Forward,
        form: Form,
        x: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        alpha: Tensor | None,
        *readers: Tensor | None,
    ) -> tuple[Tensor, ...]:
        half = len(readers) // 2
        weights, biases = readers[:half], readers[half:]
        ctx.form, ctx.half = form, half
        ctx.bias_dtypes = [None if c is None else c.dtype for c in biases]
        ctx.set_materialize_grads(False)
        saved = (x, *gradient.statistics(form, x), gain, bias, alpha)
        ctx.save_for_backward(*saved, *weights)
        norm, eps, offset = form
        call = Call(x, weights, biases, norm, eps, gain, offset, bias, alpha)  # type: ignore[arg-type]
        return tuple(run(call))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        form, half, wanted = ctx.form, ctx.half, ctx.needs_input_grad
        kept = ctx.saved_tensors
        saved, weights = gradient.current(form, Saved(*kept[:6])), kept[6:]
        rows = [None if d is None else d.reshape(-1, d.shape[-1]) for d in grads]
        dweights = _weight_gradients(
            partial(gradient.normalized, form, saved), rows, weights, wanted[6 : 6 + half]
        )
        dbiases = [
            None if d is None or dtype is None or not want else d.sum(0, dtype=_wide(d)).to(dtype)
            for d, dtype, want in zip(rows, ctx.bias_dtypes, wanted[6 + half :], strict=True)
        ]
        of_norm: gradient.Gradients = (None, None, None, None)
        if any(wanted[2:6]):
            t = _input_gradient(rows, weights)
            if t is not None:
                t = t.view(saved.x.shape)
                of_norm = gradient.backward(form, saved, t, Wanted(*wanted[2:6]))
        return (None, None, *of_norm, *dweights, *dbiases)


def _wide(d: Tensor) -> torch.dtype:
    return torch.promote_types(d.dtype, torch.float32)


def _weight_gradients(
    make: Callable[[], Tensor],
    rows: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """`dW_i = dy_iᵀ z`; z is made once, and only if somebody asks. dy_i: [M, k_i]."""
    asked = [d if want else None for d, want in zip(rows, wanted, strict=True)]
    if all(d is None for d in asked):
        return [None] * len(weights)
    z = make()
    z = z.reshape(-1, z.shape[-1])
    return [
        None if d is None else (d.T @ z).to(w.dtype) for d, w in zip(asked, weights, strict=True)
    ]


def _input_gradient(rows: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """`t = Σ_i dy_i W_i`: [M, n]."""
    total = None
    for d, w in zip(rows, weights, strict=True):
        if d is not None:
            w = w.to(d.dtype)
            total = d @ w if total is None else total.addmm_(d, w)
    return total


class Norm(Function):
    """(z, s, μ) of x [.., n]: z with a gradient, the others for whoever makes z again."""

    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        x: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        alpha: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        saved = Saved(x, *gradient.statistics(form, x), gain, bias, alpha)
        ctx.form = form
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*[t for t in saved[1:3] if t is not None])
        return gradient.normalized(form, saved), saved.scale, saved.mean

    @staticmethod
    def backward(ctx: Any, t: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = gradient.current(ctx.form, Saved(*ctx.saved_tensors))
        wanted = Wanted(*ctx.needs_input_grad[1:])
        return (None, *gradient.backward(ctx.form, saved, t, wanted))


@dataclass(frozen=True)
class Remake:
    """Makes z again from the fields of `Saved`, which are what a `Norm` returns and was given."""

    form: Form

    def __call__(self, *saved: Any) -> Tensor:
        return gradient.normalized(self.form, gradient.current(self.form, Saved(*saved)))


class Linear(Function):
    """`y = z Wᵀ + c` for a z that `make(*sources)` gives again: saves W and the sources."""

    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[..., Tensor],
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *sources: Tensor | None,
    ) -> Tensor:
        ctx.make, ctx.bias_dtype = make, None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *sources)
        return F.linear(z, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        _, of_z, of_weight, of_bias, *rest = ctx.needs_input_grad
        rows = d.reshape(-1, d.shape[-1])
        dz = d @ weight if of_z else None
        (dweight,) = _weight_gradients(partial(ctx.make, *sources), [rows], [weight], [of_weight])
        dbias = rows.sum(0, dtype=_wide(d)).to(ctx.bias_dtype) if of_bias else None
        return (None, dz, dweight, dbias, *[None] * len(rest))


class Gate(Function):
    """`act(a) ⊙ b`: saves a and b, which every layout of a GLU has to."""

    @staticmethod
    def forward(ctx: Any, activation: str, a: Tensor, b: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(a, b)
        return gradient.gated(activation, a, b)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        _, of_a, of_b = ctx.needs_input_grad
        da = gradient.through_activation(ctx.activation, d * b, a) if of_a else None
        db = d * gradient.ACTIVATIONS[ctx.activation].value(a) if of_b else None
        return None, da, db
