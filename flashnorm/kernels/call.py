"""One record: the arguments of a norm + linear, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from flashnorm.kernels import norms
from flashnorm.kernels.norms import NormKind
from flashnorm.kernels.weights import AnyWeight, memories

ACTIVATIONS = ("identity", "relu", "silu", "gelu", "gelu_tanh")


class Call(NamedTuple):
    """`[(norm(x + r) · (offset + gain) + β) W_iᵀ + c_i]`; with an activation `act(first) ⊙ second`.

    x: [.., n], weights: [k_i, n] (tensors, or `Weight` in another format), biases: [k_i], gain and
    norm_bias: [n], alpha: one number. input_residual r: [.., n], x + r is rounded to the dtype of x
    as in a model; output_residual: [.., k], added to the only result.
    """

    x: Tensor
    weights: Sequence[AnyWeight]
    biases: Sequence[Tensor | None] | None = None
    norm: NormKind = norms.RMS
    eps: float = 1e-6
    gain: Tensor | None = None
    gain_offset: float = 0.0
    norm_bias: Tensor | None = None
    alpha: Tensor | None = None
    activation: str | None = None
    output_residual: Tensor | None = None
    input_residual: Tensor | None = None

    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Those of the arguments that are given."""
        given = [r for r in (self.output_residual, self.input_residual) if r is not None]
        return [self.x, *memories(self.weights), *self.vectors(), *given]

    def vectors(self) -> list[Tensor]:
        """Those of biases, gain, norm_bias and alpha that are given."""
        given = (*(self.biases or ()), self.gain, self.norm_bias, self.alpha)
        return [vector for vector in given if vector is not None]

    def added(self) -> Call:
        """The same with x + r in the place of x."""
        if self.input_residual is None:
            return self
        return self._replace(x=self.x + self.input_residual, input_residual=None)

    def dense_weights(self) -> Sequence[Tensor]:
        """The weights, in a call that has no other than dense ones."""
        return cast("Sequence[Tensor]", self.weights)

    def results(self) -> Sequence[AnyWeight]:
        """The weights, one for each result: of a GLU only the first."""
        return self.weights[:1] if self.activation else self.weights


def check(call: Call) -> None:
    """Raise ValueError, naming the argument, where the arguments are not those of one operation."""
    x, weights, biases, _, _, gain, _, norm_bias, alpha, activation, output_residual, added = call
    check_activation(activation)
    if not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype}; it must have a floating dtype")
    n = x.shape[-1]
    for w in weights:
        if w.dim() != 2 or w.shape[1] != n:
            raise ValueError(
                f"a weight is {list(w.shape)}; x has {n} features: it must be [k, {n}]"
            )
    if biases is not None:
        _check_biases(weights, biases)
    for name, vector in (("gain", gain), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != (n,):
            raise ValueError(f"{name} is {list(vector.shape)}; it must be [{n}]")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"alpha is {list(alpha.shape)}; it must be one number")
    if activation is not None and (len(weights) != 2 or weights[0].shape != weights[1].shape):
        raise ValueError("a GLU needs two weights of one shape: gate and up")
    if output_residual is not None:
        _check_residual(call, output_residual)
    if added is not None and (added.shape != x.shape or added.dtype != x.dtype):
        raise ValueError(
            f"input_residual is {list(added.shape)} of {added.dtype}; it must be like x, "
            f"{list(x.shape)} of {x.dtype}"
        )


def check_activation(activation: str | None) -> None:
    """Raise ValueError where there is no such activation."""
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation is {activation!r}; it must be one of {known}")


def _check_biases(weights: Sequence[AnyWeight], biases: Sequence[Tensor | None]) -> None:
    if len(biases) != len(weights):
        raise ValueError(f"{len(biases)} biases for {len(weights)} weights; give None for no bias")
    for w, bias in zip(weights, biases, strict=True):
        if bias is not None and bias.shape != w.shape[:1]:
            raise ValueError(f"a bias is {list(bias.shape)}; its weight has {w.shape[0]} rows")


def _check_residual(call: Call, residual: Tensor) -> None:
    if len(call.weights) > 1 and call.activation is None:
        raise ValueError("a residual can be added to one result only, not to several")
    expected = (*call.x.shape[:-1], call.weights[0].shape[0])
    if residual.shape != expected:
        raise ValueError(f"residual is {list(residual.shape)}; the result is {list(expected)}")
