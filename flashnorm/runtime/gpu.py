"""The forwards that `accelerate_` gives to modules on a GPU.

Called one by one, operations on a GPU wait for Python, and PyTorch's own take the least of it: the
norm is one of them, and so are the products; with many rows, gate and activation are one pass.
Where nothing waits for Python, a kernel that has the norm inside saves the rest of it: in a
compiled graph, and while a CUDA graph is captured, a norm computes its readers in the same kernel.
Which of the two runs depends on shapes and on the capture alone, never on addresses or values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.functional import fused
from flashnorm.kernels import dispatch, reference
from flashnorm.kernels.call import Call
from flashnorm.runtime.forwards import (
    COMPILED,
    Fused,
    FusedGated,
    FusedLinear,
    FusedNorm,
    may_take,
)
from flashnorm.runtime.kernel import Kernel, part

FEW = 64  # rows that a kernel with the norm inside may take
FEW_COMPILED = 16  # of a compiled graph, in which a choice by measurement cannot be made
WATCHED = "a tracer, a mode or a tensor subclass watches every operation"
ATTENTION = "the model is on a GPU, where its own attention is one kernel"
LIBRARY = "no norm is before it: on a GPU its product is the library's"


def on_gpu(x: Tensor) -> bool:
    """Whether these forwards take x. Tests of them on a CPU put another answer here."""
    return x.is_cuda


def capturing() -> bool:
    """Whether the kernels that are called now go into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def place(model: nn.Module) -> torch.device | None:
    """The GPU that a model is on, None where it is not on one."""
    return next((p.device for p in model.parameters() if on_gpu(p)), None)


def available(device: torch.device) -> tuple[bool, str]:
    """Whether the kernels take calls on this device, and what they are; or why not."""
    probe = torch.zeros(1, 16, device=device)
    choice = dispatch.explain(Call(probe, (probe,)))
    if choice.backend == "reference":
        return False, choice.reason
    return True, f"Triton kernels on {device}"


def worth_compiling(x: Tensor) -> bool:
    """Whether a compiled graph should call a kernel: no gradient, few rows, as far as is known."""
    if torch.compiler.is_exporting() or torch.is_grad_enabled():
        return False
    if not on_gpu(x) or x.dtype not in COMPILED or dispatch.overridden():
        return False
    rows = x.numel() // x.shape[-1]
    return isinstance(rows, int) and rows <= FEW_COMPILED


class OnGpu(Fused):
    """What the forwards on a GPU have in common: PyTorch's own operations, bound to nothing."""

    def eager(self, x: Any) -> Any:
        reason = self.why_not(x)
        return self.fall_back(reason, x) if reason else self.values(x)

    def values(self, x: Tensor) -> Tensor:
        """What the module returns."""
        raise NotImplementedError

    def why_not(self, x: Any) -> str:
        if dispatch.watched(x):
            return WATCHED
        if not on_gpu(x):
            return f"x is on {x.device}, and the model was accelerated on a GPU"
        if dispatch.transformed():
            return dispatch.TRANSFORM
        if reason := self.changed():
            return reason
        if torch.is_grad_enabled() and self._needs_gradient(x):
            return dispatch.GRADIENT
        return self.unlike(x) or self.kernel.why_not(x)


class GpuLinear(FusedLinear):
    """`x Wᵀ + c`: what a norm has computed ahead, else the module's own."""

    def eager(self, x: Any) -> Any:
        ready = captured(x, self)
        return self.original(x) if ready is None else ready

    def compiled(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        ready = None if args or kwargs else traced(x, self)
        return self.original(x, *args, **kwargs) if ready is None else ready


class GpuGated(OnGpu, FusedGated):
    """`down(act(gate(x)) ⊙ up(x))` without the modules in between."""

    def eager(self, x: Any) -> Any:
        hidden = captured(x, self)
        return super().eager(x) if hidden is None else self.down(hidden)

    def values(self, x: Tensor) -> Tensor:
        """With few rows what Python does least for, with many one pass over both products."""
        if x.numel() > FEW * x.shape[-1]:
            hidden: Tensor = self.down(fused.run(self.kernel.call(x))[0])
            return hidden
        first, second = self.kernel.products
        if first.module is second.module:  # one product gives both halves
            return self.original(x)
        assert self.kernel.activation is not None
        gate, up = (F.linear(x, *part(*product)) for product in (first, second))
        y: Tensor = self.down(reference.ACTIVATIONS[self.kernel.activation](gate).mul_(up))
        return y

    def compiled(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        ready = None if args or kwargs else traced(x, self)
        return self.original(x, *args, **kwargs) if ready is None else self.down(ready)


class GpuNorm(OnGpu, FusedNorm):
    """A norm as one of PyTorch's operations; in graphs, its readers in one kernel with it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # The rows, dtypes and devices whose kernels are loaded, as they have to be in a capture.
        self._loaded: frozenset[tuple[int, torch.dtype, int | None]] = frozenset()

    def values(self, x: Tensor) -> Tensor:
        z = normalized(self.kernel, x)
        few = x.numel() <= FEW * x.shape[-1]
        if not (self.ahead and few) or z.is_inference() or torch.is_grad_enabled():
            return z
        state = (x.numel(), x.dtype, x.device.index)
        if capturing():
            if state in self._loaded:
                z._flashnorm = (z._version, z.data_ptr(), self._computed(x))  # type: ignore[attr-defined]
        elif state not in self._loaded:  # which loads them; every call has to give the same bits
            self._loaded |= {state}
            self._computed(x)
        return z

    def _computed(self, x: Tensor) -> dict[Fused, Tensor]:
        """What the readers will ask for, by the kernels that have the norm inside."""
        found: dict[Fused, Tensor] = {}
        for kernel, readers, between in self.ahead:
            clear = between.is_clear() and not kernel.why_not(x)
            if clear and absorbs(call := kernel.call(x)):
                found.update(zip(readers, fused.run(call), strict=True))
        return found

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What nobody reads of z is left out of a compiled graph."""
        z = self.original(x, *args, **kwargs)
        if args or kwargs or not worth_compiling(x) or z.dtype != x.dtype:
            return z
        if self.unlike(x) or self.changed_in_graph():
            return z
        found: dict[Fused, Tensor] = {}
        for kernel, readers, between in self.ahead:
            if not between.is_heard():
                found.update(zip(readers, fused.run(kernel.call(x)), strict=True))
        z._flashnorm = (None, 0, found)
        return z


def normalized(kernel: Kernel, x: Tensor) -> Tensor:
    """norm(x) · (offset + gain) + bias, rounded once."""
    call, width = kernel.call(x), x.shape[-1:]
    if call.norm == "rms" and not call.gain_offset and call.norm_bias is None:
        return F.rms_norm(x, width, call.gain, call.eps)
    if call.norm == "layer" and not call.gain_offset:
        return F.layer_norm(x, width, call.gain, call.norm_bias, call.eps)
    return reference.normalized(call)


def absorbs(call: Call) -> bool:
    """Whether the call runs on a kernel with the norm inside, not on a norm and a library."""
    choice = dispatch.explain(call)
    return choice.backend != "reference" and not choice.reason.startswith("matmul")


def captured(x: Any, reader: Fused) -> Tensor | None:
    """What a norm computed for this reader, once, where nothing can be compared with what it was.

    While a graph is captured there are no values yet. What writes into x in place is told by its
    version, but for what goes past it (`x.data`); hooks that could are excluded.
    """
    ahead = getattr(x, "_flashnorm", None)
    if ahead is None or torch.is_grad_enabled() or not may_take(reader):
        return None
    version, place, found = ahead
    if x._version != version or x.data_ptr() != place or reader.unlike(x):
        return None
    ready: Tensor | None = found.pop(reader, None)
    return ready


def traced(x: Any, reader: Fused) -> Tensor | None:
    """The same in a compiled graph, which is made of what was seen while it was traced."""
    ahead = getattr(x, "_flashnorm", None)
    if ahead is None or torch.is_grad_enabled() or reader.changed_in_graph():
        return None
    if reader.unlike(x) or reader.module._forward_pre_hooks:
        return None
    ready: Tensor | None = ahead[2].pop(reader, None)
    return ready
