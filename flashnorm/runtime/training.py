"""Which module gets which step: norms, linear layers and gated modules that are to be trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from flashnorm.graph.affine import NOT_ALONE
from flashnorm.graph.ambient import on_cpu
from flashnorm.graph.fusible import Rows
from flashnorm.kernels import norms
from flashnorm.plan import Site
from flashnorm.quantized.layout import Held
from flashnorm.runtime.build import REPLACED, Builder, Part, Refused
from flashnorm.runtime.packed import TRAINED
from flashnorm.runtime.steps import GatedStep, Half, LinearStep, NormStep, Step


@dataclass
class Trainer:
    """Makes the steps of one model, from what its builder knows."""

    builder: Builder
    steps: dict[str, Step] = field(default_factory=dict)

    @on_cpu()
    def build(self, sites: Sequence[Site]) -> list[Part]:
        fusible = self.builder.fusible
        parts = [self._try(path, "linear", self._linear) for path in fusible.linears]
        parts += [self._try(path, "linear", self._turned) for path in fusible.turned]
        parts += [self._try(path, "gated", self._gated) for path in fusible.gated]
        at: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            at[site.path].append(site)
        norms = [
            self._try(path, "norm", partial(self._norm, sites=found)) for path, found in at.items()
        ]
        return parts + norms

    def _try(self, path: str, kind: str, make: Callable[[str], Step]) -> Part:
        try:
            module = self._module(path)
            if "forward" in module.__dict__:
                raise Refused(REPLACED)
            for inner in module.modules():
                if kind != "norm" and isinstance(held := self.builder.proven.find(inner), Held):
                    raise Refused(TRAINED.format(held.origin))
            self.steps[path] = make(path)
        except Refused as refusal:
            return Part(path, kind, str(refusal))
        return Part(path, kind)

    def _module(self, path: str) -> nn.Module:
        return self.builder.model.get_submodule(path)

    def _linear(self, path: str, turned: bool = False) -> Step:
        fusible, module = self.builder.fusible, self._module(path)
        linear = (fusible.turned if turned else fusible.linears)[path]
        weight = self.builder.held(module, linear.weight)
        bias = self.builder.held(module, linear.bias) if linear.bias else ""
        return LinearStep(module, weight, bias, turned)

    def _turned(self, path: str) -> Step:
        return self._linear(path, turned=True)

    def _gated(self, path: str) -> Step:
        gated, module = self.builder.fusible.gated[path], self._module(path)
        halves = self._half(gated.gate), self._half(gated.up)
        down, inner = self._module(gated.down), self.builder.inner(module)
        return GatedStep(module, halves, gated.activation, down, inner)

    def _half(self, rows: Rows) -> Half:
        weight = self.builder.fusible.linears[rows.path].weight
        total = self.builder.model.get_parameter(weight).shape[0]
        return Half(self._module(rows.path), rows.start, rows.length, total)

    def _norm(self, path: str, sites: Sequence[Site]) -> Step:
        site, module = sites[0], self._module(path)
        dynamic = norms.described(site.kind).learns_alpha
        if len(sites) > 1 or not site.replaceable or (site.eps is None and not dynamic):
            raise Refused(NOT_ALONE)
        return NormStep(module, self.builder.affine(path))
