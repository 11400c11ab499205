"""The forwards that `accelerate_` gives to modules: kernels where they fit, else the modules' own.

A norm computes what its linear readers will ask for in the same call, and leaves it with the
tensor that it returns. Whoever else reads that tensor (an adapter, a hook, the caller) finds the
normalized values, so nothing depends on who they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from flashnorm.functional import fused
from flashnorm.kernels import cpu, dispatch, operators
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import DTYPES
from flashnorm.runtime.kernel import Kernel, part, recipe

TRAINING = "the module is in training mode"
# Where a graph is exported for any number of rows, the operator chooses in Python at every call: in
# float32 the graph's own product is faster then.
COMPILED = (torch.bfloat16, torch.float16)
MORE = "the module was given more than one argument"
OTHER = "the module returns another dtype than it is given"
HOOKED = "a module inside has hooks, or is another one than it was"


class Fused:
    """A forward with a kernel; it falls back to that of the module's class, with a reason."""

    def __init__(self, module: nn.Module, kernel: Kernel) -> None:
        self.module, self.kernel = module, kernel
        # The dtypes that the module has been seen to return as it was given them, and the others.
        self._kept: frozenset[torch.dtype] = frozenset()
        self._changed: frozenset[torch.dtype] = frozenset()

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.compiled(x, *args, **kwargs)
        reason = MORE if args or kwargs else self.why_not(x)
        if not reason:
            packed, most, reason = self.kernel.bind(x)
            if not reason:
                return self.fast(x, packed, most) if x.dtype in self._kept else self._first(x)
        dispatch.fell_back(reason)
        return self.original(x, *args, **kwargs)

    def fast(self, x: Tensor, packed: bytes, most: int) -> Tensor:
        """What the module returns, on kernels; the packed one takes `most` elements of x."""
        raise NotImplementedError

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
        size = x.numel()
        if not isinstance(size, int):
            return x.dtype in COMPILED
        return size <= recipe(self.kernel.written).most[DTYPES[x.dtype]]

    def why_not(self, x: Any) -> str:
        """Why this call has to be the module's own; empty where the parameters may decide."""
        if reason := dispatch.not_plain(x):
            return reason
        if torch.is_grad_enabled() and self._needs_gradient(x):
            return dispatch.GRADIENT
        return OTHER if x.dtype in self._changed else ""

    def _needs_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.kernel.parameters())

    def _first(self, x: Tensor) -> Tensor:
        """The first call in a dtype is the module's own: some return another one than they get."""
        y = self.original(x)
        if y.dtype == x.dtype:
            self._kept |= {x.dtype}
        else:
            self._changed |= {x.dtype}
        return y


class FusedLinear(Fused):
    """`x Wᵀ + c`, taken from x where a norm has computed it ahead."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            if (ready := taken(x, self)) is not None:
                return ready
            if isinstance(x, Tensor) and x.numel() > self.kernel.most.get(x.dtype, math.inf):
                return self.original(x, *args, **kwargs)  # the library is faster
        return super().__call__(x, *args, **kwargs)

    def fast(self, x: Tensor, packed: bytes, most: int) -> Tensor:
        return cpu.run_packed(packed, x, self.kernel.widths, None)[0]

    def compiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self.for_kernels(x):
            return self.original(x, *args, **kwargs)
        return in_graph(self.kernel.call(x))[0]


class FusedGated(Fused):
    """`down(act(gate(x)) ⊙ up(x))`: gate, up and activation as one call, then the module `down`.

    `inner` are (the modules of an owner, name, module) of all that it stands for.
    """

    def __init__(
        self,
        module: nn.Module,
        kernel: Kernel,
        down: nn.Module,
        inner: Sequence[tuple[dict[str, nn.Module | None], str, nn.Module]],
    ) -> None:
        super().__init__(module, kernel)
        self.down, self.inner = down, tuple(inner)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            if reason := self._changed_inside():
                dispatch.fell_back(reason)
                return self.original(x, *args, **kwargs)
            if (hidden := taken(x, self)) is not None:
                return self.down(hidden)
        return super().__call__(x, *args, **kwargs)

    def _changed_inside(self) -> str:
        if self.module.training:
            return TRAINING
        return "" if self._intact() else HOOKED

    def _intact(self) -> bool:
        """Whether the modules inside are those that were recorded, and nobody listens to them."""
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return False
        for owner, name, child in self.inner:
            if owner.get(name) is not child or child._forward_hooks or child._forward_pre_hooks:
                return False
        return True

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
        if args or kwargs or self.module.training or not self.for_kernels(x):
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
        ahead: Sequence[tuple[Kernel, tuple[Fused, ...]]] = (),
    ) -> None:
        super().__init__(module, kernel)
        self.ahead = tuple(ahead)

    def why_not(self, x: Any) -> str:
        return super().why_not(x) or ("" if x.is_contiguous() else "x is not contiguous")

    def fast(self, x: Tensor, packed: bytes, most: int) -> Tensor:
        z = torch.empty(x.shape, dtype=x.dtype)
        # Without a version nobody could tell that z was changed before its readers saw it; and
        # a reader's weights may want a gradient where the norm has none.
        if self.ahead and not z.is_inference() and not torch.is_grad_enabled():
            found = self._ahead(x, z)
            if found:
                z._flashnorm = (z._version, found)  # type: ignore[attr-defined]
                return z
        cpu.normalize_packed(packed, x, z)
        return z

    def _ahead(self, x: Tensor, z: Tensor) -> dict[Fused, Tensor]:
        """What the readers will ask for; where there is any, z has been filled as well."""
        found: dict[Fused, Tensor] = {}
        for kernel, readers in self.ahead:
            packed, most, reason = kernel.bind(x)
            if x.numel() <= most and not reason:
                normalized = None if found else z
                results = cpu.run_packed(packed, x, kernel.widths, None, normalized)
                found.update(zip(readers, results, strict=True))
        return found


def taken(x: Any, reader: Fused) -> Tensor | None:
    """What a norm computed ahead for this reader of its output, once."""
    ahead = getattr(x, "_flashnorm", None)
    if ahead is None or torch.is_grad_enabled():
        return None
    version, found = ahead
    return found.pop(reader, None) if x._version == version else None
