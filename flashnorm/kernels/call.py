"""One noun: the arguments of a norm + linear, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NORMS = ("none", "rms", "layer", "dyt")
ACTIVATIONS = ("identity", "relu", "silu", "gelu", "gelu_tanh")


class Call(NamedTuple):
    """`[(norm(x) · (offset + gain) + β) W_iᵀ + c_i]`; with an activation `act(first) ⊙ second`.

    x: [.., n], weights: [k_i, n], biases: [k_i], gain and norm_bias: [n], alpha: one number,
    residual: [.., k], added to the only result.
    """

    x: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None] | None = None
    norm: str = "rms"
    eps: float = 1e-6
    gain: Tensor | None = None
    gain_offset: float = 0.0
    norm_bias: Tensor | None = None
    alpha: Tensor | None = None
    activation: str | None = None
    residual: Tensor | None = None

    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Those of the arguments that are given."""
        residual = [] if self.residual is None else [self.residual]
        return [self.x, *self.weights, *self.vectors(), *residual]

    def vectors(self) -> list[Tensor]:
        """Those of biases, gain, norm_bias and alpha that are given."""
        given = (*(self.biases or ()), self.gain, self.norm_bias, self.alpha)
        return [vector for vector in given if vector is not None]


def check(call: Call) -> None:
    """Raise ValueError, naming the argument, where the arguments are not those of one operation."""
    x, weights, biases, norm, _, gain, _, norm_bias, alpha, activation, residual = call
    check_names(norm, activation)
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
    if residual is not None:
        _check_residual(call, residual)


def check_names(norm: str, activation: str | None) -> None:
    """Raise ValueError where there is no such norm or activation."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(NORMS)}")
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation is {activation!r}; it must be one of {known}")


def _check_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
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
