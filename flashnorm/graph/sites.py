"""Finding norms by what they compute: a value divided by a statistic of itself.

A product is a norm where the degrees of its statistics of x add up to −1 beside one factor x, or
x less its mean: then t·x gives what x gives, but for ε. How the product is put together, and where
the gain stands in it, does not matter. No name is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from flashnorm.graph.factors import SAME, Factors, Powers, operation, times, without
from flashnorm.graph.ir import Graph, Node, Ref
from flashnorm.graph.proof import Claim, Proofs
from flashnorm.graph.statistics import Statistic, Statistics
from flashnorm.kernels import norms
from flashnorm.plan import Kind

# Bounded functions of each element, which may stand for a norm where α·x goes in.
DYNAMIC = frozenset({"tanh", "erf", "sigmoid", "atan", "asinh", "hardtanh", "clamp"})


@dataclass(frozen=True)
class NormCall:
    """One execution of a norm of `source`, the value as it is scaled.

    `output` is normalized; fused operations apply the gain as well. `standard` where it is
    `x / sqrt(mean square + eps)` of the last axis to the letter, `centers` where a number added to
    all features of a row changes nothing. `inside` are the nodes from the source to the output.
    `early` are the gains that the output has already: (the node that multiplies by it, the gain);
    `passing` are the nodes from there to the output.
    """

    kind: Kind
    width: int
    eps: float | None
    node: Node
    source: int
    output: int
    gain: int | None = None
    bias: int | None = None
    standard: bool = True
    centers: bool = False
    inside: frozenset[int] = frozenset()
    early: tuple[tuple[int, int], ...] = ()
    passing: frozenset[int] = frozenset()


def find_norm_calls(graph: Graph) -> dict[int, NormCall]:
    """Every normalization in the graph, by the index of the node that produces its output."""
    reading = Reading(graph)
    for index, node in enumerate(graph.nodes):
        reading.read(index, node)
    return reading.found


def same_as(graph: Graph, value: int) -> int:
    """The value that `value` is a cast, copy or reshape of."""
    while (node := graph.producer(value)) is not None and node.op in SAME:
        value = node.inputs[0]
    return value


@dataclass(frozen=True)
class _Match:
    """A product that is a norm of `powers`: by which statistics, and what else is in it."""

    powers: Powers
    statistics: tuple[tuple[Statistic, str], ...]
    centered: int | None
    rest: Powers


@dataclass
class Reading:
    """The norms found so far, and what is known of the values that were read."""

    graph: Graph
    found: dict[int, NormCall] = field(default_factory=dict)
    matches: dict[int, _Match] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.factors = Factors(self.graph)
        self.statistics = Statistics(self.factors)
        self.proofs = Proofs(self.graph)

    def read(self, index: int, node: Node) -> None:
        self.factors.read(node)
        if not node.outputs or self.factors.roots_of(node.outputs[0]) is not None:
            return  # made of parameters: a weight that is normalized is no activation
        self.statistics.read(node)
        if node.op in _FUSED:
            self._add(index, _FUSED[node.op](self.graph, index, node))
        elif node.op in DYNAMIC:
            self._add(index, self._dynamic(index, node))
        elif operation(node) in ("mul", "div"):
            self._product(index, node)
        elif operation(node) in ("add", "sub"):
            self._difference(index, node)

    def _add(self, index: int, norm_call: NormCall | None) -> None:
        if norm_call is not None:
            self.found[index] = norm_call

    def _product(self, index: int, node: Node) -> None:
        out, sides = node.outputs[0], node.args[:2]
        if out in self.factors.powers:
            return
        if node.bound.get("rounding_mode") or not all(isinstance(s, Ref) for s in sides):
            return
        first, second = (self.factors.factors(side.value) for side in sides)
        powers = times(first, second, -1.0 if operation(node) == "div" else 1.0)
        if not powers:
            return
        if (match := self._match(powers)) and (norm_call := self._norm_call(index, node, match)):
            self.found[index] = norm_call  # and from here on a factor of its own
            self.matches[out] = match
        else:
            self.factors.powers[out] = powers

    def _difference(self, index: int, node: Node) -> None:
        """`x · r − mean(x) · r`: a norm less a statistic of degree 0 is the norm."""
        sides = [s.value for s in node.args[:2] if isinstance(s, Ref)]
        for one, other in (sides, sides[::-1]) if len(sides) == 2 else ():
            match, rest = self.matches.get(self.factors.same_of(one)), self.factors.factors(other)
            if match is None or match.rest or match.centered is not None:
                continue
            if self._degree(rest, match.powers) != 0:
                continue
            kind = norms.recognized(match.statistics[0][1], centered=True)
            if norm_call := self._norm_call(index, node, match, kind):
                self.found.pop(self.graph.values[self.factors.same_of(one)].node, None)
                self.found[index] = norm_call
                self.matches[node.outputs[0]] = match
            return

    def _degree(self, powers: Powers, family: Powers) -> float | None:
        """The degree of a product of statistics of one value; None where it is none."""
        total = 0.0
        for factor, e in powers:
            known = self.statistics.known.get(factor)
            families = self.statistics.families(known) if known else ()
            found = next((f for f in families if f[0] == family), None)
            if found is None:
                return None
            total += found[2] * e
        return total

    def _match(self, powers: Powers) -> _Match | None:
        known = self.statistics.known
        candidates: dict[Powers, None] = {}
        for factor, _ in powers:
            if factor in known:
                families = self.statistics.families(known[factor])
                candidates |= {family: None for family, _, _ in families}
        matches = (self._match_family(powers, family) for family in candidates)
        return next((match for match in matches if match), None)

    def _match_family(self, powers: Powers, family: Powers) -> _Match | None:
        known, degree = self.statistics.known, 0.0
        members, used = [], set()
        for factor, e in powers:
            families = self.statistics.families(known[factor]) if factor in known else ()
            found = next((f for f in families if f[0] == family), None)
            if found is not None:
                degree += found[2] * e
                members.append((known[factor], found[1]))
                used.add((factor, e))
        if abs(degree + 1.0) > 1e-9:
            return None
        left = powers - used
        for factor, e in left:
            center = self.statistics.centers.get(factor)
            if center is not None and e == 1 and center.powers == family:
                return _Match(family, tuple(members), factor, left - {(factor, e)})
        rest = without(left, family)
        return None if rest is None else _Match(family, tuple(members), None, rest)

    def _norm_call(
        self, index: int, node: Node, match: _Match, kind: Kind = norms.OTHER
    ) -> NormCall | None:
        statistic, form = match.statistics[0]
        if match.centered is not None:
            source = self.statistics.centers[match.centered].value
        else:
            source = statistic.value
        if len(match.statistics) == 1 and kind == norms.OTHER:
            kind = norms.recognized(form, match.centered is not None)
        others = frozenset(factor for factor, _ in match.rest)
        if any(self.factors.size(node.outputs[0]) < self.factors.size(f) for f in others):
            return None
        inside = self._inside(node.outputs[0], source, match.powers, others)
        eps = statistic.epsilon
        claim = Claim(kind, statistic.width, eps, source, node.outputs[0], inside, others)
        standard, centers = self.proofs.prove(claim)
        if norms.described(kind).centers and match.centered is None and not centers:
            kind = norms.OTHER
        early = tuple(self._early(inside, match.rest))
        return NormCall(
            kind,
            statistic.width,
            eps,
            node,
            source,
            node.outputs[0],
            standard=standard and statistic.plain,
            centers=centers,
            inside=inside,
            early=early,
            passing=self._passing(inside, {at for at, _ in early}),
        )

    def _inside(
        self, output: int, source: int, powers: Powers, others: frozenset[int]
    ) -> frozenset[int]:
        """The nodes from the source to the output: statistics, casts, and the product itself."""
        stops = {factor for factor, _ in powers} | others | {self.factors.same_of(source)}
        found: set[int] = set()
        waiting = [output]
        while waiting:
            value = waiting.pop()
            index = self.graph.values[value].node
            if index < 0 or index in found or self.factors.same_of(value) in stops:
                continue
            found.add(index)
            waiting += self.graph.nodes[index].inputs
        return frozenset(found)

    def _early(self, inside: frozenset[int], rest: Powers) -> Iterator[tuple[int, int]]:
        """Where the product is multiplied by what is made of parameters alone."""
        factors = {factor for factor, _ in rest if self.factors.roots_of(factor)}
        for index in sorted(inside):
            node = self.graph.nodes[index]
            if operation(node) in ("mul", "div"):
                for value in node.inputs:
                    if self.factors.same_of(value) in factors:
                        yield index, value

    def _passing(self, inside: frozenset[int], first: set[int]) -> frozenset[int]:
        found = set(first)
        for index in sorted(inside):
            makers = {self.graph.values[value].node for value in self.graph.nodes[index].inputs}
            if makers & found:
                found.add(index)
        return frozenset(found)

    def _dynamic(self, index: int, node: Node) -> NormCall | None:
        """`f(α·x + b)`, element by element; α and b come from parameters of one element."""
        value, exact, scaled, inside = node.inputs[0], node.op == "tanh", False, {index}
        while (made := self.graph.producer(value)) is not None:
            others: list[int] = []
            if made.op in SAME:
                value = made.inputs[0]
            elif (operands := self._by_numbers(made)) is not None:
                value, others = operands
            else:
                break
            if others and operation(made) in ("mul", "div"):
                whole = all(self.graph.values[v].origin == "parameter" for v in others)
                exact = exact and whole and made.op == "mul" and not scaled
                scaled = scaled or any(self.factors.roots_of(v) for v in others)
            elif made.op not in SAME:
                exact = False
            inside.add(self.graph.values[made.outputs[0]].node)
        shape, out = self.graph.values[value].shape, node.outputs[0]
        if not scaled or not shape:
            return None
        facts = {"standard": exact, "inside": frozenset(inside)}
        return NormCall(norms.DYT.name, shape[-1], None, node, value, out, **facts)  # type: ignore[arg-type]

    def _by_numbers(self, node: Node) -> tuple[int, list[int]] | None:
        """(x, others) where a node is x times, over, plus or less values of one element."""
        op = operation(node)
        if op not in ("mul", "div", "add", "sub") or node.bound.get("rounding_mode"):
            return None
        rest = [v for v in node.inputs if self.factors.roots_of(v) is None]
        others = [v for v in node.inputs if self.factors.roots_of(v) is not None]
        if len(rest) != 1 or any(self.factors.size(v) != 1 for v in others):
            return None
        if op == "div" and node.inputs[0] != rest[0]:
            return None
        return rest[0], others


def _fused(kind: Kind) -> Callable[[Graph, int, Node], NormCall | None]:
    def norm_call(graph: Graph, index: int, node: Node) -> NormCall | None:
        named = node.bound
        shape = named["normalized_shape"]
        simple = len(shape) == 1
        return NormCall(
            kind,
            prod(shape),
            named["eps"],
            node,
            named["input"].value,
            node.outputs[0],
            _ref(named.get("weight")),
            _ref(named.get("bias")),
            standard=simple,
            centers=simple and norms.described(kind).centers,
            inside=frozenset({index}),
        )

    return norm_call


def _grouped(graph: Graph, index: int, node: Node) -> NormCall | None:
    """A norm over groups of channels and all positions; its gain was made a node of its own."""
    named = node.bound
    if named.get("training", named.get("use_input_stats", True)) is not True:
        return None  # an affine map with stored numbers
    source, out = node.inputs[0], node.outputs[0]
    shape = graph.values[source].shape
    groups = named.get("num_groups", named.get("group", shape[1]))
    width = prod(shape[1:]) // max(1, groups)
    inside = frozenset({index})
    return NormCall(
        norms.GROUP, width, named["eps"], node, source, out, standard=False, inside=inside
    )


def _ref(item: Any) -> int | None:
    return item.value if isinstance(item, Ref) else None


_FUSED: dict[str, Callable[[Graph, int, Node], NormCall | None]] = {
    **dict.fromkeys(("native_layer_norm", "layer_norm"), _fused(norms.LAYER.name)),
    **dict.fromkeys(("_fused_rms_norm", "rms_norm"), _fused(norms.RMS.name)),
    **dict.fromkeys(
        ("native_group_norm", "group_norm", "native_batch_norm", "instance_norm"), _grouped
    ),
}
