"""Norm + linear for parameters that stay: what a module calls for every token.

Shapes and dtypes are checked and bound once, so that a call costs a few microseconds; a parameter
that has moved or been replaced, or another dtype of x, is noticed and bound again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashnorm.functional.fused import run
from flashnorm.kernels import dispatch, norms
from flashnorm.kernels.backend import Bound
from flashnorm.kernels.call import Call, check
from flashnorm.kernels.weights import memories, packed


class BoundCalls:
    """`run(call)` that keeps what a backend bound for the call before, for the next one like it.

    What is kept depends on nothing but the state it is kept with, and holds no tensor: a copy of
    it, another thread, or memory that has been given to another tensor can do no harm.
    """

    def __init__(self) -> None:
        # What parameters and x were like, the kernel, or None where there is none.
        self._kept: tuple[list[Any], Bound | None] = ([], None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return BoundCalls, ()

    def __call__(self, call: Call) -> list[Tensor]:
        """As `flashnorm.functional`: compiled, traced, with gradients and on other devices too."""
        if torch.compiler.is_compiling() or not _only_values(call) or packed(call.weights):
            return run(call)
        x, residual = call.x, call.output_residual
        state = _state(call)
        known, bound = self._kept
        if state != known:
            bound = self._bind(call, state)
        if bound is None or x.numel() > bound.most or call.input_residual is not None:
            return run(call)
        if residual is not None and not _fits(residual, call):
            return run(call)
        return bound.run(x, residual)

    def _bind(self, call: Call, state: list[Any]) -> Bound | None:
        call = call._replace(output_residual=None, input_residual=None)
        check(call)
        backend = dispatch.backend_of(call.x)
        found = backend.bind(call) if backend.keeps else ""
        bound = None if isinstance(found, str) else found
        if backend.keeps:
            self._kept = (state, bound)
        return bound


def _only_values(call: Call) -> bool:
    """Whether nothing but the values matters: no tracer, no transform, no gradient."""
    return not (
        dispatch.watched(call.x, *memories(call.weights))
        or dispatch.transformed()
        or (torch.is_grad_enabled() and call.needs_gradient())
    )


def _state(call: Call) -> list[Any]:
    """All that a bound call depends on: options, and where and how its parameters lie."""
    x, _, biases, norm, eps, gain, offset, norm_bias, alpha, activation, *_ = call
    state: list[Any] = [x.dtype, x.device, x.shape[-1], norm, eps, offset, activation]
    for w in call.dense_weights():
        state += (w.data_ptr(), w.dtype, w.shape, w.stride())
    for vector in (*(biases or ()), gain, norm_bias, alpha):
        if vector is None:
            state.append(None)
        else:
            state += (vector.data_ptr(), vector.dtype, vector.shape, vector.is_contiguous())
    return state


def _fits(residual: Tensor, call: Call) -> bool:
    x = call.x
    return residual.dtype == x.dtype and residual.shape == (
        *x.shape[:-1],
        *(w.shape[0] for w in call.results()),
    )


class Prepared:
    """`flashnorm.functional` for parameters that stay: `prepared(x, residual=None)` gives a list.

    weights, biases and options are those of `flashnorm.functional.norm_linears`, with `activation`
    those of `norm_glu`; x: [.., n], weights: [k_i, n]. The result is the same as that of the plain
    functions, in every mode (compiled, traced, with gradients, on other devices), and in the same
    dtypes. Raises TypeError for options that are not known and ValueError for an unknown norm; a
    call raises what those functions raise.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        *,
        norm: str = norms.RMS.name,
        **options: Any,
    ) -> None:
        call = Call(torch.empty(0), weights, biases, norms.find(norm), **options)
        self._rest = call[1:-2]
        self._run = BoundCalls()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> list[Tensor]:
        """x: [.., n], residual: [.., k]; returns [.., k_i] for every weight, in the dtype of x."""
        return self._run(Call(x, *self._rest, residual))
