"""Norm + linear with its parameters bound: what a module calls for every token.

Shapes and dtypes are checked and packed once, so that a call costs a few microseconds; a parameter
that has moved, or another dtype of x, is noticed and packed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashnorm.functional.fused import run
from flashnorm.kernels import cpu, dispatch
from flashnorm.kernels.call import Call, check


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
        call = Call(torch.empty(0), *self._rest)
        given = (*weights, *(biases or ()), call.gain, call.norm_bias, call.alpha)
        self._tensors = [tensor for tensor in given if tensor is not None]
        widths = [w.shape[0] for w in weights]
        self._widths = widths[:1] if call.activation else widths
        # What the parameters and x were like, the packed call, and how much of x it may take.
        self._bound: tuple[tuple[Any, ...], bytes, int] = ((), b"", 0)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> list[Tensor]:
        """x: [.., n], residual: [.., k]; returns [.., k_i] for every weight."""
        if torch.compiler.is_compiling() or not self._plain(x, residual):
            return run(Call(x, *self._rest, residual))
        state = (x.dtype, x.is_cpu, x.shape[-1], *[t.data_ptr() for t in self._tensors])
        bound, packed, most = self._bound
        if state != bound:
            packed, most = self._pack(x, state)
        if x.numel() > most:
            return run(Call(x, *self._rest, residual))
        return cpu.run_packed(packed, x, self._widths, residual)

    def _plain(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether nothing but the values matters: no tracer, no gradient, a residual that fits."""
        if dispatch.watched(x):
            return False
        if residual is not None and (
            residual.dtype != x.dtype or residual.shape != (*x.shape[:-1], *self._widths)
        ):
            return False
        return not torch.is_grad_enabled() or not Call(x, *self._rest, residual).needs_gradient()

    def _pack(self, x: Tensor, state: tuple[Any, ...]) -> tuple[bytes, int]:
        call = Call(x, *self._rest)
        check(call)
        if cpu.why_not(call):
            return b"", -1
        packed, most = cpu.pack(call), cpu.most_rows(call) * x.shape[-1]
        self._bound = (state, packed, most)
        return packed, most
