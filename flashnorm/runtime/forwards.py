"""The forwards that `accelerate_` gives to modules: kernels where they fit, else the modules' own.

A norm computes what its linear readers will ask for in the same call, and leaves it with the
tensor that it returns. Whoever else reads that tensor (an adapter, a hook, the caller) finds the
normalized values, so nothing depends on who they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from flashnorm.functional import fused
from flashnorm.kernels import dispatch
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu import operators
from flashnorm.kernels.cpu.calls import DTYPES
from flashnorm.runtime import learn
from flashnorm.runtime.ahead import Ahead, Between, Places
from flashnorm.runtime.kernel import Kernel, part, recipe
from flashnorm.runtime.stand import Stand
from flashnorm.runtime.watch import CHANGED, TRAINING, Watch

# Where a graph is exported for any number of rows, the operator chooses in Python at every call: in
# float32 the graph's own product is faster then.
COMPILED = (torch.bfloat16, torch.float16)
MORE = "the module was given more than one argument"
HOOKED = "a module inside has hooks, or is another one than it was"


class Inner(NamedTuple):
    """A module inside of one that a kernel stands for; without a watch it is called as it is."""

    owner: dict[str, nn.Module | None]
    name: str
    module: nn.Module
    watch: Watch | None


class Fused(Stand):
    """A forward with a kernel; it falls back to that of the module's class, with a reason.

    `dtypes` says why a dtype is not taken, or nothing where it is; `inner` are the modules inside.
    """

    def __init__(
        self,
        module: nn.Module,
        kernel: Kernel,
        dtypes: dict[torch.dtype, str],
        inner: Sequence[Inner] = (),
    ) -> None:
        self.module, self.kernel, self.dtypes = module, kernel, dtypes
        self.inner, self.watch = tuple(inner), Watch(module)
        self.places = Places([(owner, name, child) for owner, name, child, _ in self.inner])
        self.watches = [watch for *_, watch in self.inner if watch is not None]
        # What is called by the module's name: this forward, or one around it.
        self.installed: Any = self

    def install(self) -> None:
        """Remember who is called by the modules' names, once all forwards are in place."""
        self.installed = self.module.__dict__.get("forward")
        for watch in self.watches:
            watch.include_calls()

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.compiled(x, *args, **kwargs)
        if args or kwargs:
            return self.fall_back(MORE, x, *args, **kwargs)
        return self.eager(x)

    def eager(self, x: Any) -> Any:
        if reason := self.why_not(x):
            return self.fall_back(reason, x)
        packed, most, reason = self.kernel.bind(x)
        return self.fall_back(reason, x) if reason else self.fast(x, packed, most)

    def fast(self, x: Tensor, packed: bytes, most: int) -> Tensor:
        """What the module returns, on kernels; the packed one takes `most` elements of x."""
        raise NotImplementedError

    def fall_back(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        dispatch.fell_back(reason)
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.original(x, *args, **kwargs)

    def for_kernels(self, x: Tensor) -> bool:
        """Whether a compiled graph should call the kernel: no gradient, few rows, if known."""
        if torch.compiler.is_exporting():  # a program must run where flashnorm is not installed
            return False
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in DTYPES:
            return False
        if dispatch.overridden():
            return False
        if self.unlike(x) or self.changed_in_graph():
            return False
        size = x.numel()
        if not isinstance(size, int):
            return x.dtype in COMPILED
        return size <= recipe(self.kernel.written).most[DTYPES[x.dtype]]

    def why_not(self, x: Any) -> str:
        """Why this call has to be the module's own; empty where the parameters may decide."""
        if reason := dispatch.not_plain(x) or self.changed() or self.unlike(x):
            return reason
        if torch.is_grad_enabled() and self._needs_gradient(x):
            return dispatch.GRADIENT
        return ""

    def changed(self) -> str:
        """Why the module is not what was recorded; empty where it is."""
        if self.watch.changed():
            return TRAINING if self.module.training else CHANGED
        return HOOKED if self.inner and not self.intact() else ""

    def intact(self) -> bool:
        """Whether the modules inside are those that were recorded, and nobody listens to them."""
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return False
        if not self.places.hold():
            return False
        for watch in self.watches:  # noqa: SIM110  (this is asked at every call)
            if watch.changed():
                return False
        return True

    def changed_in_graph(self) -> bool:
        """`changed`, for a compiled graph."""
        if self.watch.changed_in_graph():
            return True
        if self.inner and (hooks._global_forward_hooks or hooks._global_forward_pre_hooks):
            return True
        for owner, name, child, watch in self.inner:
            if owner.get(name) is not child:
                return True
            if watch is not None and (
                child._forward_hooks or child._forward_pre_hooks or watch.changed_in_graph()
            ):
                return True
        return False

    def unlike(self, x: Tensor) -> str:
        """Why the kernel does not stand for the module in this dtype; empty where it does."""
        reason = self.dtypes.get(x.dtype)
        return learn.UNKNOWN.format(x.dtype) if reason is None else reason

    def _needs_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.kernel.parameters())


class FusedLinear(Fused):
    """`x Wᵀ + c`, taken from x where a norm has computed it ahead."""

    def eager(self, x: Any) -> Any:
        if (ready := taken(x, self)) is not None:
            return ready
        if isinstance(x, Tensor) and x.numel() > self.kernel.most.get(x.dtype, math.inf):
            return self.original(x)  # the library is faster
        return super().eager(x)

    def fast(self, x: Tensor, packed: bytes, most: int) -> Tensor:
        return cpu.run_packed(packed, x, self.kernel.widths, None)[0]

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self.for_kernels(x):
            return self.original(x, *args, **kwargs)
        return in_graph(self.kernel.call(x))[0]


class FusedGated(Fused):
    """`down(act(gate(x)) ⊙ up(x))`: gate, up and activation as one call, then the module `down`."""

    def __init__(self, module: nn.Module, kernel: Kernel, down: nn.Module, *rest: Any) -> None:
        super().__init__(module, kernel, *rest)
        self.down = down

    def eager(self, x: Any) -> Any:
        hidden = taken(x, self)
        return super().eager(x) if hidden is None else self.down(hidden)

    def fast(self, x: Tensor, packed: bytes, most: int) -> Tensor:
        if x.numel() <= most:
            return self.down(cpu.run_packed(packed, x, self.kernel.widths, None)[0])
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= BLOCK:
            return self.down(self._many(x))
        y = torch.cat([self.down(self._many(block)) for block in rows.split(BLOCK)])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _many(self, x: Tensor) -> Tensor:
        """The library's matmuls, and a gate of one pass over the first one's result."""
        gate, up = (F.linear(x, *part(*product)) for product in self.kernel.products)
        width = gate.shape[-1]
        assert self.kernel.activation is not None
        cpu.gate_(gate.view(-1, width), up.view(-1, width), self.kernel.activation)
        return gate

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self.for_kernels(x):
            return self.original(x, *args, **kwargs)
        return self.down(in_graph(self.kernel.call(x))[0])


def in_graph(call: Call) -> list[Tensor]:
    """The operation as a compiled graph calls it: without Python where shapes are known."""
    few = isinstance(call.x.numel(), int) and not fused.wants_torch(call.tensors())
    return operators.norm_linear(call) if few and operators.takes(call) else fused.run(call)


# Rows that a gated module takes at a time: what is between its products stays in the caches, and
# takes no memory to speak of.
BLOCK = 512


class FusedNorm(Fused):
    """A norm, and ahead of time what reads it: kernels, and the forwards that take the results."""

    def __init__(
        self,
        module: nn.Module,
        kernel: Kernel,
        ahead: Sequence[tuple[Kernel, tuple[Fused, ...], Between]],
        *rest: Any,
    ) -> None:
        super().__init__(module, kernel, *rest)
        self.ahead = tuple(ahead)

    def why_not(self, x: Any) -> str:
        return super().why_not(x) or ("" if x.is_contiguous() else "x is not contiguous")

    def eager(self, x: Any) -> Any:
        if reason := self.why_not(x):
            return self.fall_back(reason, x)
        # A reader's weights may want a gradient where the norm has none.
        if self.ahead and not torch.is_grad_enabled():
            z = torch.empty_like(x)
            if found := self._ahead(x, z):
                z._flashnorm = Ahead(z, found)  # type: ignore[attr-defined]
                return z
        packed, most, reason = self.kernel.bind(x)
        return self.fall_back(reason, x) if reason else self.fast(x, packed, most)

    def fast(self, x: Tensor, packed: bytes, most: int) -> Tensor:
        return cpu.normalize_packed(packed, x, torch.empty_like(x))

    def _ahead(self, x: Tensor, z: Tensor) -> dict[Fused, Tensor]:
        """What the readers will ask for; where there is any, z has been filled as well."""
        found: dict[Fused, Tensor] = {}
        for kernel, readers, between in self.ahead:
            if not between.is_clear():
                continue
            packed, most, reason = kernel.bind(x)
            if x.numel() <= most and not reason:
                normalized = None if found else z
                results = cpu.run_packed(packed, x, kernel.widths, None, normalized)
                found.update(zip(readers, results, strict=True))
        return found


def taken(x: Any, reader: Fused) -> Tensor | None:
    """What a norm computed ahead for this reader of its output, once."""
    ahead = getattr(x, "_flashnorm", None)
    if ahead is None or torch.is_grad_enabled() or not may_take(reader):
        return None
    if not dispatch.same_as_before() or reader.unlike(x):
        return None
    found: Tensor | None = ahead.take(x, reader)
    return found


def may_take(reader: Fused) -> bool:
    """Whether a reader is what was recorded, and is called by the module as it was."""
    if reader.module.__dict__.get("forward") is not reader.installed or reader.watch.changed():
        return False
    return not reader.inner or reader.intact()
