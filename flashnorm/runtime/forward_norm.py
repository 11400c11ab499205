"""The forward of a norm: it computes what reads it in the same call, and leaves that with z."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.functional import fused
from flashnorm.kernels.backend import Precompute
from flashnorm.kernels.loaded import Loaded
from flashnorm.runtime import deferred, handoff, lazy
from flashnorm.runtime.bound import Kernel
from flashnorm.runtime.forwards import Fused, run_in_graph
from flashnorm.runtime.handoff import Between
from flashnorm.runtime.spec import read_spec


class FusedNorm(Fused):
    """A norm, and what reads it in the same call: kernels, and forwards that take the results."""

    def __init__(
        self,
        module: nn.Module,
        kernel: Kernel,
        readers: Sequence[tuple[Kernel, tuple[Fused, ...], Between]],
        *rest: Any,
    ) -> None:
        super().__init__(module, kernel, *rest)
        self.readers = tuple(readers)
        # Elements, dtypes and devices whose kernels are loaded, as they have to be in a capture.
        self._loaded = Loaded()

    def kernels(self) -> list[Kernel]:
        return [self.kernel, *(kernel for kernel, _, _ in self.readers)]

    def why_not(self, x: Any) -> str:
        if reason := super().why_not(x):
            return reason
        dense = x.is_contiguous() or not self.kernel.backend.limits.contiguous
        return "" if dense else "x is not contiguous"

    def eager(self, x: Any) -> Any:
        x = lazy.value(x)
        if reason := self.why_not(x):
            return self.fall_back(reason, x)
        # A reader's weights may want a gradient where the norm has none.
        if self.readers and not torch.is_grad_enabled():
            if self.kernel.backend.policy.precompute is Precompute.ALWAYS:
                z, found = self._precomputed(x)
                if z is not None:
                    handoff.leave(z, found)
                    return z
            elif (z := self._in_capture(x)) is not None:
                return z
        bound, reason = self.kernel.bind(x)
        return self.fall_back(reason, x) if bound is None else bound.normalize(x)

    def _precomputed(self, x: Tensor) -> tuple[Tensor | None, dict[Fused, Tensor]]:
        """norm(x), and what the readers will ask for; None where there is nothing of that."""
        z: Tensor | None = None
        found: dict[Fused, Tensor] = {}
        for kernel, readers, between in self.readers:
            if not between.is_clear():
                continue
            bound, _ = kernel.bind(x)
            if bound is not None and bound.precomputes(x):
                z, results = bound.normalize_and_run(x, z)
                found.update(zip(readers, results, strict=True))
        return z, found

    def _in_capture(self, x: Tensor) -> Tensor | None:
        """`_precomputed` where a step is captured, by kernels that are loaded then.

        Before that they are run once to load them, for nothing else: every call outside of a
        capture has to give the same bits.
        """
        backend = self.kernel.backend
        rows = backend.policy.captured_rows
        if x.numel() > rows * x.shape[-1] or torch.is_inference_mode_enabled():
            return None
        state = (x.numel(), x.dtype, x.device.index)
        if backend.capturing():
            if state not in self._loaded:
                return None
            if (step := lazy.current()) is not None:
                return self._left_out(x, step)
            z, found = self._precomputed(x)
            if z is not None:
                handoff.leave(z, found, captured=True)
            return z
        self._loaded.load(state, lambda: self._precomputed(x))
        return None

    def _left_out(self, x: Tensor, step: lazy.Pass) -> Tensor | None:
        """The same in a pass of `capture_`, where nothing computes z unless somebody reads it."""
        found: dict[Fused, Tensor] = {}
        for kernel, readers, between in self.readers:
            bound = kernel.bind(x)[0] if between.is_clear() else None
            if bound is not None and bound.precomputes(x):
                found.update(zip(readers, bound.run(x), strict=True))
        alone, _ = self.kernel.bind(x)
        if not found or alone is None:
            return None
        like = (x.shape, x.dtype, x.device)
        z = step.leave(like, [x, *self.kernel.parameters()], lambda: alone.normalize(x))
        handoff.leave(z, found, captured=True)
        return z

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What nobody reads of z is left out of a compiled graph."""
        z = self.original(x, *args, **kwargs)
        if args or kwargs or not read_spec(self.kernel.written).precompute or z.dtype != x.dtype:
            return z
        if self.kernel.misfit(x):
            return z
        found: dict[Fused, Tensor] = {}
        for kernel, readers, between in self.readers:
            if between.is_heard():
                continue
            if self.in_graph(kernel, x):
                found.update(zip(readers, run_in_graph(kernel.call(x)), strict=True))
            elif self._defers_in_graph(kernel, x):
                found[readers[0]] = deferred.gated(kernel.call(x))
        if found:
            handoff.leave_in_graph(z, found)
        return z

    def _defers_in_graph(self, kernel: Kernel, x: Tensor) -> bool:
        """Whether a graph should scale the products of x; not where others read norm(x) as well."""
        if len(self.readers) > 1 or not deferred.defers(read_spec(kernel.written), x):
            return False
        return self.is_free_in_graph(x) and not fused.wants_torch(kernel.call(x).tensors())
