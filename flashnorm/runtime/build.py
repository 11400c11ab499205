"""Which module gets which forward: from what was recorded to kernels on live modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from torch import nn

from flashnorm.graph.fusible import Fusible, Gated, Rows
from flashnorm.kernels import cpu
from flashnorm.plan import Site
from flashnorm.runtime.forwards import Fused, FusedGated, FusedLinear, FusedNorm
from flashnorm.runtime.gpu import LIBRARY, GpuGated, GpuLinear, GpuNorm
from flashnorm.runtime.kernel import Kernel, Norm, Product, Slice

NOT_LINEAR = "in the recorded passes it was not reached, or was not x Wᵀ + c of its one argument"
NOT_ALONE = "its module does more than this norm, or takes more than one argument"
NOT_OWN = "it reads a parameter that its module does not hold itself"
REPLACED = "its forward has been replaced on the module itself"
NOT_AFFINE = "its gain is not a number plus a parameter of {} elements"
NOT_KIND = "the kernels have no {} norm by itself"


class Refused(Exception):
    """A module keeps its own forward; the text says why."""


@dataclass(frozen=True)
class Part:
    """One module, and what became of it: `reason` is empty where it runs on a kernel.

    kind is "norm", "linear" or "gated"; `ahead` names what a norm computes for its readers.
    """

    path: str
    kind: str
    reason: str = ""
    ahead: tuple[str, ...] = ()


class Kinds(NamedTuple):
    """The forwards of one kind of device."""

    linear: type[FusedLinear] = FusedLinear
    gated: type[FusedGated] = FusedGated
    norm: type[FusedNorm] = FusedNorm


ON_CPU, ON_GPU = Kinds(), Kinds(GpuLinear, GpuGated, GpuNorm)


@dataclass
class Builder:
    """Makes the forwards of one model. `folded` names the gains that are one everywhere."""

    model: nn.Module
    fusible: Fusible
    folded: frozenset[str]
    kinds: Kinds = ON_CPU
    made: dict[str, Fused] = field(default_factory=dict)

    @property
    def forwards(self) -> list[tuple[nn.Module, Fused]]:
        return [(fused.module, fused) for fused in self.made.values()]

    def build(self, sites: Sequence[Site]) -> list[Part]:
        """Linear layers first, then what is made of them, then the norms before both."""
        parts = [self._try(path, "linear", self._linear) for path in self._linears()]
        parts += [self._try(path, "gated", self._gated) for path in self.fusible.gated]
        at: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            at[site.path].append(site)
        for path, found in at.items():
            part = self._try(path, "norm", partial(self._norm, sites=found))
            ahead = self._readers(path) if not part.reason else ()
            parts.append(replace(part, ahead=ahead))
        return parts if self.kinds is ON_CPU else self._without_idle(parts)

    def _without_idle(self, parts: Sequence[Part]) -> list[Part]:
        """On a GPU linear layers have kernels only where a norm computes them."""
        used = {name for part in parts for name in part.ahead}
        idle = {part.path for part in parts if part.kind == "linear" and part.path not in used}
        for path in idle:
            self.made.pop(path, None)
        return [
            replace(part, reason=part.reason or LIBRARY) if part.path in idle else part
            for part in parts
        ]

    def refuse(self, sites: Sequence[Site], reason: str) -> list[Part]:
        """No module is touched, for one reason."""
        paths = dict.fromkeys(site.path for site in sites)
        parts = [Part(path, "linear", reason) for path in self._linears()]
        return parts + [Part(path, "norm", reason) for path in paths]

    def _linears(self) -> Iterator[str]:
        """Linear layers, and whatever else holds a matrix and is not a table of rows."""
        yield from self.fusible.linears
        for path, module in self.model.named_modules():
            matrix = any(p is not None and p.ndim == 2 for p in module._parameters.values())
            if matrix and path not in self.fusible.linears and not isinstance(module, nn.Embedding):
                yield path

    def _try(self, path: str, kind: str, make: Callable[[str], Fused]) -> Part:
        try:
            if "forward" in self.model.get_submodule(path).__dict__:
                raise Refused(REPLACED)
            self.made[path] = make(path)
        except Refused as refusal:
            return Part(path, kind, str(refusal))
        return Part(path, kind)

    def _linear(self, path: str) -> Fused:
        if path not in self.fusible.linears:
            raise Refused(NOT_LINEAR)
        linear = self.fusible.linears[path]
        module = self.model.get_submodule(path)
        weight = module._parameters.get(self.held(module, linear.weight))
        assert weight is not None
        product = self._product(Rows(path, 0, weight.shape[0]))
        return self.kinds.linear(module, Kernel(products=(product,)))

    def _gated(self, path: str) -> Fused:
        gated, module = self.fusible.gated[path], self.model.get_submodule(path)
        pair = self._pair(gated)
        down = self.model.get_submodule(gated.down)
        kernel = Kernel(products=pair, activation=gated.activation)
        return self.kinds.gated(module, kernel, down, self.inner(module))

    def inner(self, module: nn.Module) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
        """(the modules of an owner, name, module) of all modules inside of one."""
        return [
            (owner._modules, name, child)
            for owner in module.modules()
            for name, child in owner._modules.items()
            if child is not None
        ]

    def _pair(self, gated: Gated) -> tuple[Product, Product]:
        return self._product(gated.gate), self._product(gated.up)

    def _product(self, rows: Rows) -> Product:
        linear, module = self.fusible.linears[rows.path], self.model.get_submodule(rows.path)
        weight = self.held(module, linear.weight)
        bias = self.held(module, linear.bias) if linear.bias else ""
        total = self.model.get_parameter(linear.weight).shape[0]
        return Product(module, Slice(rows.start, rows.length, total, weight, bias))

    def held(self, module: nn.Module, parameter: str) -> str:
        """What the module itself calls a parameter."""
        target = self.model.get_parameter(parameter)
        for name, held in module._parameters.items():
            if held is target:
                return name
        raise Refused(NOT_OWN)

    def _norm(self, path: str, sites: Sequence[Site]) -> Fused:
        site, module = sites[0], self.model.get_submodule(path)
        if len(sites) > 1 or not site.replaceable or site.eps is None:
            raise Refused(NOT_ALONE)
        if site.kind == "dyt":
            raise Refused(NOT_KIND.format(site.kind))
        norm = self.affine(site, module)
        ahead = [
            (Kernel(norm, module, products, activation), readers)
            for products, activation, readers in self._ahead(path)
        ]
        return self.kinds.norm(module, Kernel(norm, module), ahead)

    def affine(self, site: Site, module: nn.Module) -> Norm:
        """The norm with the gain and bias that its module holds, if it holds nothing else."""
        gain = self.held(module, site.weight.parameter) if site.weight else ""
        bias = self.held(module, site.shift) if site.shift else ""
        held = {name for name, parameter in module.named_parameters()}
        if held != {name for name in (gain, bias) if name}:
            raise Refused(NOT_OWN)
        if not site.weight:
            return Norm(site.kind, site.eps or 0.0)
        shape = self.model.get_parameter(site.weight.parameter).shape
        if site.weight.scale != 1.0 or shape != (site.width,):
            raise Refused(NOT_AFFINE.format(site.width))
        if site.weight.parameter in self.folded:
            gain = ""
        return Norm(site.kind, site.eps or 0.0, gain, site.weight.offset, bias)

    def _readers(self, path: str) -> tuple[str, ...]:
        """The modules that are always given the norm's output and run on kernels."""
        return tuple(name for name in self.fusible.readers.get(path, ()) if name in self.made)

    def _ahead(
        self, path: str
    ) -> Iterator[tuple[tuple[Product, ...], str | None, tuple[Fused, ...]]]:
        """The calls that compute all readers: linear layers together, gated modules one by one."""
        readers = self._readers(path)
        linears = [name for name in readers if name in self.fusible.linears]
        for first in range(0, len(linears), cpu.MOST_WEIGHTS):
            names = linears[first : first + cpu.MOST_WEIGHTS]
            products = tuple(self.made[name].kernel.products[0] for name in names)
            yield products, None, tuple(self.made[name] for name in names)
        for name in readers:
            if name in self.fusible.gated:
                gated = self.fusible.gated[name]
                yield self._pair(gated), gated.activation, (self.made[name],)
