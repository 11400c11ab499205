"""Linear layers that no norm computes, while a step is captured: one kernel with a residual.

    y = r + x Wᵀ (+ c)

That is where r + product is what comes next; elsewhere, and outside of captures, they have their
own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashnorm.kernels.backend import Bound
from flashnorm.kernels.loaded import Loaded
from flashnorm.runtime import lazy
from flashnorm.runtime.forwards import Fused
from flashnorm.runtime.stand import Stand


class Product(Stand):
    """The forward of such a layer within a `lazy.Pass`."""

    def __init__(self, fused: Fused) -> None:
        self.module, self.fused = fused.module, fused
        # Elements, dtypes and devices of x whose kernels are loaded.
        self._loaded = Loaded()

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        x, step = lazy.value(x), lazy.current()
        bound = None if step is None or args or kwargs else self._bound(x)
        if step is None or bound is None:
            return self.fused.original(x, *args, **kwargs)
        state = (x.numel(), x.dtype, x.device)
        if step.loading and not self._loaded.knows(state):
            y: Tensor = self.fused.original(x)
            self._loaded.load(state, partial(bound.run, x, torch.zeros_like(y)))
            return y
        if state not in self._loaded:
            return self.fused.original(x)
        return self._left(x, bound, step)

    def _bound(self, x: Any) -> Bound | None:
        """The kernel for x, where there is one that takes a residual."""
        fused = self.fused
        if fused.why_not(x):
            return None
        if x.numel() > fused.kernel.backend.policy.captured_rows * x.shape[-1]:
            return None
        bound, _ = fused.kernel.bind(x)
        return bound if bound is not None and bound.precomputes(x) else None

    def _left(self, x: Tensor, bound: Bound, step: lazy.Pass) -> Tensor:
        width = self.fused.kernel.products[0].rows.length
        return step.leave(
            (torch.Size((*x.shape[:-1], width)), x.dtype, x.device),
            [x, *self.fused.kernel.parameters()],
            lambda: self.fused.original(x),
            lambda residual: bound.run(x, residual)[0],
        )


@contextmanager
def installed(products: Sequence[Product]) -> Iterator[None]:
    """The context in which linear layers have these forwards, but for those that have another."""
    before = {}
    for product in products:
        held = vars(product.module)
        if held.get("forward", product.fused) is product.fused:
            before[product] = "forward" in held
            held["forward"] = product
    try:
        yield
    finally:
        for product, had in before.items():
            if had:
                vars(product.module)["forward"] = product.fused
            else:
                vars(product.module).pop("forward", None)
