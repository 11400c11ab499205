"""Norm + linear for parameters that stay: what a module calls for every token.

Shapes and dtypes are checked and packed once, so that a call costs a few microseconds; a parameter
that has moved or been replaced, or another dtype of x, is noticed and packed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashnorm.functional.fused import run
from flashnorm.kernels import dispatch
from flashnorm.kernels.call import Call, check
from flashnorm.kernels.cpu import calls as cpu


class PackedCalls:
    """`run(call)` that keeps the packed parameters of the call before, for the next one like it.

    What is packed depends on nothing but the state it is kept with, and no tensor is held: a copy
    of it, another thread, or memory that has been given to another tensor can do no harm.
    """

    def __init__(self) -> None:
        # What parameters and x were like, the packed call, how much of x it takes, its results.
        self._kept: tuple[list[Any], bytes, int, list[int]] = ([], b"", 0, [])

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PackedCalls, ()

    def __call__(self, call: Call) -> list[Tensor]:
        """As `flashnorm.functional`: compiled, traced, with gradients and on other devices too."""
        if torch.compiler.is_compiling() or not _only_values(call):
            return run(call)
        x, residual = call.x, call.residual
        state = _state(call)
        known, packed, most, widths = self._kept
        if state != known:
            packed, most, widths = self._pack(call, state)
        if x.numel() > most or (residual is not None and not _fits(residual, x, widths)):
            return run(call)
        return cpu.run_packed(packed, x, widths, residual)

    def _pack(self, call: Call, state: list[Any]) -> tuple[bytes, int, list[int]]:
        call = call._replace(residual=None)
        check(call)
        if cpu.why_not(call):
            return b"", -1, []
        made = call.weights[:1] if call.activation else call.weights
        packed, widths = cpu.pack(call), [w.shape[0] for w in made]
        most = cpu.most_rows(call) * call.x.shape[-1]
        self._kept = (state, packed, most, widths)
        return packed, most, widths


def _only_values(call: Call) -> bool:
    """Whether nothing but the values matters: no tracer, no transform, no gradient."""
    return not (
        dispatch.watched(call.x, *call.weights)
        or dispatch.transformed()
        or (torch.is_grad_enabled() and call.needs_gradient())
    )


def _state(call: Call) -> list[Any]:
    """All that a packed call depends on: options, and where and how its parameters lie."""
    x, weights, biases, norm, eps, gain, offset, norm_bias, alpha, activation, _ = call
    state: list[Any] = [x.dtype, x.is_cpu, x.shape[-1], norm, eps, offset, activation]
    for w in weights:
        state += (w.data_ptr(), w.dtype, w.shape, w.stride())
    for vector in (*(biases or ()), gain, norm_bias, alpha):
        if vector is None:
            state.append(None)
        else:
            state += (vector.data_ptr(), vector.dtype, vector.shape, vector.is_contiguous())
    return state


def _fits(residual: Tensor, x: Tensor, widths: list[int]) -> bool:
    return residual.dtype == x.dtype and residual.shape == (*x.shape[:-1], *widths)


class Prepared:
    """`flashnorm.functional` for parameters that stay: `prepared(x, residual=None)` gives a list.

    weights, biases and options are those of `kernels.call.Call`. The result is the same as that of
    the plain functions, in every mode (compiled, traced, with gradients, on other devices).
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        **options: Any,
    ) -> None:
        self._rest = Call(torch.empty(0), weights, biases, **options)[1:-1]
        self._run = PackedCalls()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> list[Tensor]:
        """x: [.., n], residual: [.., k]; returns [.., k_i] for every weight."""
        return self._run(Call(x, *self._rest, residual))
