"""Which module gets which forward: from what was recorded to kernels on live modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from flashnorm.graph.affine import NOT_ALONE
from flashnorm.graph.ambient import on_cpu
from flashnorm.graph.fusible import Fusible, Gated, Linear, Rows
from flashnorm.kernels.backend import Backend
from flashnorm.plan import Site
from flashnorm.quantized.layout import Held
from flashnorm.runtime import learn
from flashnorm.runtime.bound import Kernel, Product
from flashnorm.runtime.forward_norm import FusedNorm
from flashnorm.runtime.forwards import (
    Fused,
    FusedGated,
    FusedLinear,
    Inner,
    watch_of,
)
from flashnorm.runtime.handoff import Between
from flashnorm.runtime.packed import Proven, kind, packed_product, taken_linear, taken_pair
from flashnorm.runtime.refused import REPLACED as REPLACED
from flashnorm.runtime.refused import Refused as Refused
from flashnorm.runtime.refused import check
from flashnorm.runtime.spec import Norm, Slice
from flashnorm.runtime.watch import Watch

NOT_LINEAR = "in the recorded passes it was not reached, or was not x Wᵀ + c of its one argument"
NOT_OWN = "it reads a parameter that its module does not hold itself"
TURNED = "its weight is held as [in, out], which these kernels do not read"


@dataclass(frozen=True)
class Part:
    """One module, and what became of it: `reason` is empty where it runs on a kernel.

    kind is "norm", "linear" or "gated"; `precomputed` names the readers that a norm computes.
    """

    path: str
    kind: str
    reason: str = ""
    precomputed: tuple[str, ...] = ()


@dataclass
class Builder:
    """Makes the forwards of one model, on one backend."""

    model: nn.Module
    fusible: Fusible
    backend: Backend
    made: dict[str, Fused] = field(default_factory=dict)
    proven: Proven = field(init=False)
    idle: dict[str, Fused] = field(default_factory=dict)  # linear layers that keep their forward

    def __post_init__(self) -> None:
        self.proven = Proven(self.backend.limits.dtypes)

    @property
    def forwards(self) -> list[tuple[nn.Module, Fused]]:
        return [(fused.module, fused) for fused in self.made.values()]

    @property
    def alone(self) -> list[Fused]:
        """Idle layers that no other forward stands for, which have kernels in captured steps."""
        if not self.backend.uses("residual"):
            return []
        inner = {i.module for fused in self.made.values() for i in fused.inner if i.watch}
        return [fused for fused in self.idle.values() if fused.module not in inner]

    @on_cpu()
    def build(self, sites: Sequence[Site]) -> list[Part]:
        """Linear layers first, then what is made of them, then the norms before both."""
        parts = [self._try(path, "linear", self._linear) for path in self._linears()]
        parts += [self._try(path, "gated", self._gated) for path in self.fusible.gated]
        for path in dict.fromkeys(site.path for site in sites):
            part = self._try(path, "norm", self._norm)
            precomputed = self._readers(path) if not part.reason else ()
            parts.append(replace(part, precomputed=precomputed))
        return self._without_idle(parts) if self.backend.policy.idle else parts

    def _without_idle(self, parts: Sequence[Part]) -> list[Part]:
        """Linear layers have kernels only where a norm computes them, or in compiled graphs."""
        used = {name for part in parts for name in part.precomputed}
        idle = {part.path for part in parts if part.kind == "linear" and part.path not in used}
        for path in [path for path in self.made if path in idle]:
            self.idle[path] = self.made[path]
            if not self.backend.compiled.alone:
                del self.made[path]
        return [
            replace(part, reason=part.reason or self.backend.policy.idle)
            if part.path in idle
            else part
            for part in parts
        ]

    def refuse(self, sites: Sequence[Site], reason: str) -> list[Part]:
        """No module is touched, for one reason."""
        paths = dict.fromkeys(site.path for site in sites)
        parts = [Part(path, "linear", reason) for path in self._linears()]
        return parts + [Part(path, "norm", reason) for path in paths]

    def _linears(self) -> Iterator[str]:
        """Linear layers, and whatever else holds a matrix and is not a table of rows."""
        known = self.fusible.linears | self.fusible.turned
        yield from known
        for path, module in self.model.named_modules():
            matrix = any(p is not None and p.ndim == 2 for p in module._parameters.values())
            matrix = matrix or self.proven.find(module) is not None
            if matrix and path not in known and not isinstance(module, nn.Embedding):
                yield path

    def _try(self, path: str, kind: str, make: Callable[[str], Fused]) -> Part:
        try:
            self._check(self.model.get_submodule(path))
            self.made[path] = make(path)
        except Refused as refusal:
            return Part(path, kind, str(refusal))
        return Part(path, kind)

    def _check(self, module: nn.Module) -> Held | None:
        """How a module holds a packed weight, if it does; raises as `check`."""
        held = self.proven.find(module)
        if isinstance(held, str):
            raise Refused(held)
        check(module, held)
        return held

    def _linear(self, path: str) -> Fused:
        linear = self.fusible.linears.get(path) or self.fusible.turned.get(path)
        if linear is None:
            raise Refused(NOT_LINEAR)
        if linear.turned and not self.backend.limits.turned:
            raise Refused(TURNED)
        module = self.model.get_submodule(path)
        product = self._product(linear)
        if product.packed is not None:
            taken = taken_linear(product, self.fusible.kept[path], self.backend)
            packed = product.packed
            return FusedLinear(module, taken, packed.dtypes, (), packed.held)
        own, bias = product.rows.weight, product.rows.bias
        known = self._known(path, replace(linear, path="", weight=own, bias=bias))
        return FusedLinear(module, Kernel(self.backend, products=(product,)), *known)

    def _gated(self, path: str) -> Fused:
        gated, module = self.fusible.gated[path], self.model.get_submodule(path)
        pair = self._pair(gated)
        down = self.model.get_submodule(gated.down)
        kernel = Kernel(self.backend, products=pair, activation=gated.activation)
        dtypes, inner = self._known(path, _relative(gated), down)
        if kernel.packed:
            parts = {rows.path: rows.path in self.made for rows in (gated.gate, gated.up)}
            dtypes = taken_pair(kernel, dtypes, parts)
        return FusedGated(module, kernel, down, dtypes, inner)

    def _known(
        self, path: str, told: learn.Told | None, called: nn.Module | None = None
    ) -> tuple[dict[torch.dtype, str], list[Inner]]:
        """What a forward has to know of its module: why not in which dtype, and what is inside.

        `told` is what the module was seen to do, by its own names; `called` a module that is called
        as it is.
        """
        module = self.model.get_submodule(path)
        inner = self.inner(module, called)
        for child in (module, *(i.module for i in inner if i.watch)):
            held = self._check(child)
            if held is not None:  # proven, whatever its code looks like
                continue
            if reason := Watch(child).why_not():
                raise Refused(reason)
        shape, kept = self.fusible.given[path], self.fusible.kept[path]
        others = [dtype for dtype in self.backend.limits.dtypes if dtype not in kept]
        dtypes = {dtype: learn.why_not(module, told, shape, dtype) for dtype in others}
        return dict.fromkeys(kept, "") | dtypes, inner

    def inner(self, module: nn.Module, called: nn.Module | None = None) -> list[Inner]:
        """All modules inside of one, but for those inside of the one that is called."""
        found = []
        for name, child in module._modules.items():
            if child is not None:
                watch = None if child is called else watch_of(child, self._held_by(child))
                found.append(Inner(module._modules, name, child, watch))
                found += [] if child is called else self.inner(child, called)
        return found

    def _held_by(self, module: nn.Module) -> Held | None:
        held = self.proven.find(module)
        return held if isinstance(held, Held) else None

    def _pair(self, gated: Gated) -> tuple[Product, Product]:
        linears = self.fusible.linears
        gate, up = (self._product(linears[rows.path], rows) for rows in (gated.gate, gated.up))
        return gate, up

    def _product(self, linear: Linear, rows: Rows | None = None) -> Product:
        """The module at a path, and some of its rows, or all."""
        module = self.model.get_submodule(linear.path)
        if (held := self._held_by(module)) is not None:
            known = self.made.get(linear.path)
            packed = None if known is None else known.kernel.packs[0]
            if packed is None:
                packed = self.proven.packed(module, held, self.fusible.kept[linear.path])
            return packed_product(module, packed, rows)
        weight = self.held(module, linear.weight)
        bias = self.held(module, linear.bias) if linear.bias else ""
        total = self.model.get_parameter(linear.weight).shape[1 if linear.turned else 0]
        start, length = (rows.start, rows.length) if rows else (0, total)
        return Product(module, Slice(start, length, total, weight, bias, linear.turned))

    def held(self, module: nn.Module, parameter: str) -> str:
        """What the module itself calls a parameter."""
        target = self.model.get_parameter(parameter)
        for name, held in module._parameters.items():
            if held is target:
                return name
        raise Refused(NOT_OWN)

    def _norm(self, path: str) -> Fused:
        module, norm = self.model.get_submodule(path), self.affine(path)
        gain, bias, alpha = norm.names()
        told = replace(self.fusible.norms[path], path="", gain=gain, bias=bias, alpha=alpha)
        readers = [
            (
                Kernel(self.backend, norm, module, products, activation),
                forwards,
                self._between(path, forwards),
            )
            for products, activation, forwards in self._together(path)
        ]
        kernel = Kernel(self.backend, norm, module)
        return FusedNorm(module, kernel, readers, *self._known(path, told))

    def affine(self, path: str) -> Norm:
        """The norm with the gain, bias and α that its module holds, if it holds nothing else."""
        if path not in self.fusible.norms:
            raise Refused(self.fusible.unfit.get(path, NOT_ALONE))
        norm, module = self.fusible.norms[path], self.model.get_submodule(path)
        names = (norm.gain, norm.bias, norm.alpha)
        gain, bias, alpha = (self.held(module, name) if name else "" for name in names)
        held = {name for name, parameter in module.named_parameters()}
        if held != {name for name in (gain, bias, alpha) if name}:
            raise Refused(NOT_OWN)
        return Norm(norm.kind, norm.eps, gain, norm.offset, bias, alpha)

    def _between(self, path: str, readers: Sequence[Fused]) -> Between:
        """Who is called between a norm and these readers: what one is in, and the other is not."""
        norm = self.model.get_submodule(path)
        after, before, places = [norm], [], []
        for reader in readers:
            module = reader.module
            after += [m for m in self.above[norm] if m not in self.above[module]]
            before += [module, *(m for m in self.above[module] if m not in self.above[norm])]
            for owner in self.above[module]:
                names = [name for name, child in owner._modules.items() if child is module]
                places += [(owner._modules, name, module) for name in names]
        return Between(list(dict.fromkeys(after)), list(dict.fromkeys(before)), places)

    @cached_property
    def above(self) -> dict[nn.Module, list[nn.Module]]:
        """All modules that a module is in, under whatever names."""
        found: dict[nn.Module, dict[nn.Module, None]] = {}

        def enter(module: nn.Module, over: tuple[nn.Module, ...]) -> None:
            found.setdefault(module, {}).update(dict.fromkeys(over))
            for child in module._modules.values():
                if child is not None:
                    enter(child, (*over, module))

        enter(self.model, ())
        return {module: list(over) for module, over in found.items()}

    def _readers(self, path: str) -> tuple[str, ...]:
        """The modules that are always given the norm's output and run on kernels."""
        return tuple(name for name in self.fusible.readers.get(path, ()) if name in self.made)

    def _together(
        self, path: str
    ) -> Iterator[tuple[tuple[Product, ...], str | None, tuple[Fused, ...]]]:
        """The calls that compute all readers: linear layers together, gated modules one by one."""
        readers = self._readers(path)
        for names in self._alike(readers):
            products = tuple(self.made[name].kernel.products[0] for name in names)
            yield products, None, tuple(self.made[name] for name in names)
        for name in readers:
            if name in self.fusible.gated:
                gated = self.fusible.gated[name]
                yield self._pair(gated), gated.activation, (self.made[name],)

    def _alike(self, readers: Sequence[str]) -> Iterator[Sequence[str]]:
        """The linear layers of these whose weights one call takes."""
        most = self.backend.limits.weights
        alike: dict[Any, list[str]] = {}
        for layout in (self.fusible.linears, self.fusible.turned):
            for name in (name for name in readers if name in layout):
                alike.setdefault(kind(self.made[name].kernel.products[0]), []).append(name)
        for names in alike.values():
            yield from (names[first : first + most] for first in range(0, len(names), most))


def _relative(gated: Gated) -> Gated | None:
    """The same with paths as the module has them; None where a part is not inside it."""
    inside = f"{gated.path}." if gated.path else ""
    paths = (gated.gate.path, gated.up.path, gated.down)
    if not all(path.startswith(inside) for path in paths):
        return None
    gate, up, down = (path[len(inside) :] for path in paths)
    return replace(
        gated,
        path="",
        gate=replace(gated.gate, path=gate),
        up=replace(gated.up, path=up),
        down=down,
    )
