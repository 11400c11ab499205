"""Values as products: which factors a value is made of, and to which powers.

`x · g / r`, `(g / r) · x` and `x · (g · r⁻¹)` are one product of x, g and r. A factor is a value
that is no product itself. Numbers are left out, and so are casts and moves of all elements: what
was found so is proven on numbers (`proof.py`) before anything relies on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import gcd, prod
from typing import Any

from flashnorm.graph.ir import Graph, Node, Ref
from flashnorm.graph.operations import CASTS, RESHAPES

# Operations through which a value stays itself: its elements keep their values and order.
SAME = CASTS | RESHAPES | {"expand", "expand_as", "unsqueeze", "squeeze"}
# All elements in other places, and some of them.
TURNS = frozenset({"t", "transpose", "permute", "movedim", "numpy_T"})
PARTS = frozenset({"slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind"})
SYNONYMS = {"multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub"}
_MOST_FACTORS = 16

Powers = frozenset[tuple[int, float]]
Roots = frozenset[str] | None


@dataclass
class Factors:
    """What is known of every value of a graph, read in the order of execution.

    `roots` are the parameters a value is computed from (None: it depends on an input), `same` the
    first value with the same elements, `powers` the factors of a value that is a product.
    `magnitudes` and `parts` map a value to the factors of what it is |·|, or a part, of.
    """

    graph: Graph
    roots: dict[int, Roots] = field(default_factory=dict)
    same: dict[int, int] = field(default_factory=dict)
    powers: dict[int, Powers] = field(default_factory=dict)
    magnitudes: dict[int, Powers] = field(default_factory=dict)
    parts: dict[int, Powers] = field(default_factory=dict)
    seen: dict[Any, tuple[int, ...]] = field(default_factory=dict)

    def roots_of(self, value: int) -> Roots:
        if value not in self.roots:
            made = self.graph.values[value]
            known: dict[str, Roots] = {"input": None, "parameter": frozenset({made.parameter})}
            self.roots[value] = known.get(made.origin, frozenset())
        return self.roots[value]

    def same_of(self, value: int) -> int:
        return self.same.get(value, value)

    def factors(self, value: int) -> Powers:
        value = self.same_of(value)
        return self.powers.get(value, frozenset({(value, 1.0)}))

    def is_number(self, value: int, learned: bool = False) -> bool:
        """One element that no input decides, and no parameter unless `learned`."""
        roots = self.roots_of(value)
        return self.size(value) == 1 and roots is not None and (learned or not roots)

    def size(self, value: int) -> int:
        return prod(self.graph.values[value].shape)

    def read(self, node: Node) -> None:
        """Enter the outputs of the next operation."""
        roots: Roots = frozenset()
        for value in node.inputs:
            known = self.roots_of(value)
            roots = None if roots is None or known is None else roots | known
        self.roots.update(dict.fromkeys(node.outputs, roots))
        if not node.inputs or not node.outputs:
            return
        if is_same(node):
            if not self.graph.values[node.outputs[0]].dtype.is_floating_point:
                return  # rounded
            self.same[node.outputs[0]] = self.same_of(node.inputs[0])
        elif node.op in TURNS:
            self.powers[node.outputs[0]] = self.factors(node.inputs[0])
        elif node.op in PARTS:
            self.parts.update(dict.fromkeys(node.outputs, self.factors(node.inputs[0])))
        elif node.op == "abs":
            self.magnitudes[node.outputs[0]] = self.factors(node.inputs[0])

    def recognize(self, node: Node) -> bool:
        """Whether the same was computed before, of the same: then its outputs are those."""
        before = self.seen.setdefault(self._key(node), node.outputs)
        if before == node.outputs:
            return False
        self.same.update(zip(node.outputs, map(self.same_of, before), strict=False))
        return True

    def _key(self, node: Node) -> Any:
        return node.op, self._frozen(node.args), self._frozen(tuple(sorted(node.kwargs.items())))

    def _frozen(self, tree: Any) -> Any:
        if isinstance(tree, Ref):
            return "value", self.same_of(tree.value), self.graph.values[tree.value].shape
        if isinstance(tree, (tuple, list)):
            return tuple(self._frozen(item) for item in tree)
        return tree if isinstance(tree, (int, float, str, bool, type(None))) else repr(tree)


def is_same(node: Node) -> bool:
    if node.op == "permute":
        return list(node.args[1]) == list(range(len(node.args[1])))
    return node.op in SAME


def operation(node: Node) -> str:
    return SYNONYMS.get(node.op, node.op)


def times(first: Powers, second: Powers, power: float = 1.0) -> Powers | None:
    """`first · second^power`; None where that has too many factors to be worth knowing."""
    found = dict(first)
    for factor, exponent in second:
        found[factor] = found.get(factor, 0.0) + exponent * power
    if len(found) > _MOST_FACTORS:
        return None
    return frozenset((factor, e) for factor, e in found.items() if e)


def raised(powers: Powers, power: float) -> Powers:
    return frozenset((factor, e * power) for factor, e in powers)


def root(powers: Powers) -> tuple[Powers, int] | None:
    """(base, k) where the powers are those of base^k with the largest whole k."""
    if not powers or any(e != int(e) for _, e in powers):
        return None
    k = gcd(*(int(e) for _, e in powers))
    return raised(powers, 1 / k), k


def without(powers: Powers, factors: Powers) -> Powers | None:
    """The powers with these factors taken out; None where they are not all there."""
    left = dict(powers)
    for factor, e in factors:
        have = left.get(factor, 0.0)
        if have < e or e < 0:
            return None
        left[factor] = have - e
    return frozenset((factor, e) for factor, e in left.items() if e)


def opened(powers: Powers, inside: dict[int, Powers]) -> Powers | None:
    """The powers with each factor replaced by what it was made of."""
    found: Powers | None = frozenset()
    for factor, e in powers:
        part: Iterable[tuple[int, float]] = inside.get(factor, frozenset({(factor, 1.0)}))
        found = None if found is None else times(found, frozenset(part), e)
    return found
