"""The forwards that `accelerate_` gives to modules: kernels where they fit, else the modules' own.

A norm computes what its linear readers will ask for in the same call, and leaves it with the
tensor that it returns. Whoever else reads that tensor (an adapter, a hook, the caller) finds the
normalized values, so nothing depends on who they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.compat.torch_names import forward_hooks_of_all, forward_pre_hooks_of_all
from flashnorm.functional import fused
from flashnorm.kernels import dispatch, reference
from flashnorm.kernels.backend import Bound, Way
from flashnorm.kernels.call import Call
from flashnorm.kernels.exporting import exporting
from flashnorm.kernels.weights import dense
from flashnorm.quantized.layout import Held
from flashnorm.runtime import handoff, lazy, learn
from flashnorm.runtime.bound import Kernel, part
from flashnorm.runtime.handoff import Places
from flashnorm.runtime.spec import read_spec
from flashnorm.runtime.stand import Stand
from flashnorm.runtime.watch import CHANGED, TRAINING, Watch

MORE = "the module was given more than one argument"
HOOKED = "a module inside has hooks, or is another one than it was"
# Rows that a gated module takes at a time: what is between its products stays in the caches, and
# takes no memory to speak of.
BLOCK = 512


class Inner(NamedTuple):
    """A module inside of one that a kernel stands for; without a watch it is called as it is."""

    owner: dict[str, nn.Module | None]
    name: str
    module: nn.Module
    watch: Watch | None


def watch_of(module: nn.Module, held: Held | None = None) -> Watch:
    """What looks after a module; of one with a packed weight the attributes that it sets itself
    may change."""
    return Watch(module) if held is None else Watch(module, settles=held.settles)


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
        held: Held | None = None,
    ) -> None:
        self.module, self.kernel, self.dtypes = module, kernel, dtypes
        self.inner, self.watch = tuple(inner), watch_of(module, held)
        self.held = held
        # A forward of the origin's own that this one takes the place of.
        self.before = module.__dict__.get("forward")
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

    def kernels(self) -> list[Kernel]:
        """All that this forward calls."""
        return [self.kernel]

    def eager(self, x: Any) -> Any:
        if reason := self.why_not(x):
            return self.fall_back(reason, x)
        bound, reason = self.kernel.bind(x)
        return self.fall_back(reason, x) if bound is None else self.fast(x, bound)

    def fast(self, x: Tensor, bound: Bound) -> Tensor:
        """What the module returns, on kernels."""
        raise NotImplementedError

    def fall_back(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        dispatch.fell_back(reason)
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.held is not None and self.held.own is not None:
            return self.held.own(self.module, *args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.original(x, *args, **kwargs)

    def in_graph(self, kernel: Kernel, x: Tensor) -> bool:
        """Whether a compiled graph should call a kernel: no gradient, few rows, if known."""
        spec = read_spec(kernel.written)
        if not spec.takes(x) or not self.is_free_in_graph(x):
            return False
        return not spec.fuses or fuse_graphs()

    def is_free_in_graph(self, x: Tensor) -> bool:
        """Whether a compiled graph may hold something else than the module's own operations."""
        if exporting() or torch.is_grad_enabled() or dispatch.overridden():
            return False
        return not (self.unlike(x) or self.changed_in_graph())

    def why_not(self, x: Any) -> str:
        """Why this call has to be the module's own; empty where the parameters may decide."""
        if reason := dispatch.not_plain(x, self.kernel.backend) or self.changed() or self.unlike(x):
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
        if forward_hooks_of_all or forward_pre_hooks_of_all:
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
        if self.inner and (forward_hooks_of_all or forward_pre_hooks_of_all):
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
    """`x Wᵀ + c`, taken from x where a norm has computed it."""

    def eager(self, x: Any) -> Any:
        if (ready := handoff.pop_precomputed(x, self)) is not None:
            return ready
        if self.kernel.backend.policy.idle:
            return self.original(x)
        if isinstance(x, Tensor) and x.numel() > self.kernel.most.get(x.dtype, math.inf):
            return self.original(x)  # the library is faster
        return super().eager(x)

    def fast(self, x: Tensor, bound: Bound) -> Tensor:
        return bound.run(x)[0]

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.original(x, *args, **kwargs)
        ready = computed_in_graph(self, x)
        return self.original(x) if ready is None else ready


class FusedGated(Fused):
    """`down(act(gate(x)) ⊙ up(x))`: gate, up and activation as one call, then the module `down`."""

    def __init__(self, module: nn.Module, kernel: Kernel, down: nn.Module, *rest: Any) -> None:
        super().__init__(module, kernel, *rest)
        self.down = down

    def eager(self, x: Any) -> Any:
        hidden = handoff.pop_precomputed(x, self)
        if hidden is not None:
            return self.down(hidden)
        x = lazy.value(x)
        if self.kernel.packed and isinstance(x, Tensor) and self._too_many(x):
            return self.original(x)  # no library multiplies by a packed weight
        return self._by_library(x) if self._few_by_library(x) else super().eager(x)

    def _too_many(self, x: Tensor) -> bool:
        return x.numel() > self.kernel.most.get(x.dtype, math.inf)

    def _few_by_library(self, x: Any) -> bool:
        """Whether torch's own operations take the least of Python for this x."""
        if self.kernel.backend.policy.few is not Way.LIBRARY or not isinstance(x, Tensor):
            return False
        if self.kernel.packed:
            return False
        if x.numel() > self.kernel.most.get(x.dtype, 0):
            return False
        return not (self.why_not(x) or self.kernel.why_not(x))

    def fast(self, x: Tensor, bound: Bound) -> Tensor:
        policy = self.kernel.backend.policy
        way = policy.few if x.numel() <= bound.most else policy.many
        if way is Way.KERNEL or self.kernel.packed:
            return self._in_blocks(x, lambda block: bound.run(block)[0])
        return self._in_blocks(x, self._gated) if way is Way.BLOCKS else self._by_library(x)

    def _in_blocks(self, x: Tensor, gated: Callable[[Tensor], Tensor]) -> Tensor:
        if x.numel() <= BLOCK * x.shape[-1]:
            return self.down(gated(x))
        rows = x.reshape(-1, x.shape[-1])
        y = torch.cat([self.down(gated(block)) for block in rows.split(BLOCK)])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _gated(self, x: Tensor) -> Tensor:
        """The library's matmuls, and a gate of one pass over the first one's result."""
        gate, up = self._products(x)
        width = gate.shape[-1]
        assert self.kernel.activation is not None
        self.kernel.backend.gate_(gate.view(-1, width), up.view(-1, width), self.kernel.activation)
        return gate

    def _products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [part(*product) for product in self.kernel.products]
        gate, up = (F.linear(x, dense(w, x.dtype), c) for w, c in pairs)
        return gate, up

    def _by_library(self, x: Tensor) -> Tensor:
        """What Python does least for."""
        first, second = self.kernel.modules
        if first is second:  # one product gives both halves
            return self.original(x)
        assert self.kernel.activation is not None
        gate, up = self._products(x)
        y: Tensor = self.down(reference.ACTIVATIONS[self.kernel.activation](gate).mul_(up))
        return y

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.original(x, *args, **kwargs)
        hidden = computed_in_graph(self, x)
        return self.original(x) if hidden is None else self.down(hidden)


def computed_in_graph(reader: Fused, x: Tensor) -> Tensor | None:
    """What a norm has computed for a reader in a compiled graph, or what its own kernel does."""
    spec = read_spec(reader.kernel.written)
    if spec.precompute and (ready := handoff.pop_in_graph(x, reader)) is not None:
        return ready
    if spec.alone and reader.in_graph(reader.kernel, x):
        return run_in_graph(reader.kernel.call(x))[0]
    return None


@torch.compiler.assume_constant_result
def fuse_graphs() -> bool:
    """Have the graph that is traced now edited when it is compiled: loaded here, and never else."""
    from flashnorm.runtime import inductor

    inductor.install()
    return True


def run_in_graph(call: Call) -> list[Tensor]:
    """The operation as a compiled graph calls it: without Python where shapes are known."""
    if isinstance(call.x.numel(), int) and not fused.wants_torch(call.tensors()):
        found = dispatch.backend_of(call.x).in_graph(call)
        if found is not None:
            return found
    return fused.run(call)
