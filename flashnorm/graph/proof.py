"""Proving on numbers what a norm is: its own operations, run in float64, against its formula."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from flashnorm.graph.factors import is_same
from flashnorm.graph.failures import UnknownSpelling, bug
from flashnorm.graph.ir import Graph, Node, Ref
from flashnorm.graph.replay import run
from flashnorm.kernels import norms

# Sizes of x at which ε weighs nothing, something and all, against a mean square of about one.
_SIZES = (1e3, 1.0, 1e-3, 1e-6)
# Rounding of float64 times the operations of a norm, and a difference of squares in between.
_TOLERANCE = 1e-9
_SHIFT = 2.0


@dataclass(frozen=True)
class Claim:
    """What a norm is said to be: that of `source`, by the operations `inside`, giving `output`.

    `others` are factors that are neither x nor a statistic: gains, gates.
    """

    kind: str
    width: int
    eps: float | None
    source: int
    output: int
    inside: frozenset[int]
    others: frozenset[int]


@dataclass
class Proofs:
    """Claims that were put to the proof, so that norms of one make are run once."""

    graph: Graph
    known: dict[Any, tuple[bool, bool]] = field(default_factory=dict)

    def prove(self, claim: Claim) -> tuple[bool, bool]:
        """(it is the norm that the kernels have, over the last axis; any shift of x leaves it)."""
        key = self._key(claim)
        if key not in self.known:
            try:
                self.known[key] = self._prove(claim)
            except UnknownSpelling:
                self.known[key] = False, False
            except Exception as error:
                bug(error)
                self.known[key] = False, False
        return self.known[key]

    def _prove(self, claim: Claim) -> tuple[bool, bool]:
        shape = self.graph.values[claim.source].shape
        if not shape or shape[-1] != claim.width or not norms.described(claim.kind).scales:
            return False, False
        if 0 in shape:
            return not claim.others and claim.eps is not None, norms.described(claim.kind).centers
        return self._is_standard(claim, shape), self._is_centered(claim, shape)

    def _is_standard(self, claim: Claim, shape: tuple[int, ...]) -> bool:
        if claim.others or claim.eps is None:
            return False
        kind = norms.described(claim.kind)
        for x in _probes(shape, claim.eps):
            expected = kind.hat(x, *kind.statistics(x, claim.eps), None)
            runner = _Runner(self.graph, claim, x)
            found = runner.value(claim.output)
            if runner.guessed or found.shape != expected.shape or not _are_close(found, expected):
                return False
        return True

    def _is_centered(self, claim: Claim, shape: tuple[int, ...]) -> bool:
        """Whether a number added to all features of a row changes nothing, row by row."""
        if not norms.described(claim.kind).centers:
            return False
        x, shift = _random(shape, 0), _random((*shape[:-1], 1), 1) * _SHIFT
        plain, shifted = (_Runner(self.graph, claim, v).value(claim.output) for v in (x, x + shift))
        return _are_close(shifted, plain)

    def _key(self, claim: Claim) -> Any:
        """Norms with the same operations on values of the same shapes are one make."""
        numbers: dict[int, int] = {claim.source: 0}
        nodes = []
        for index in sorted(claim.inside):
            node = self.graph.nodes[index]
            for value in (*node.inputs, *node.outputs):
                numbers.setdefault(value, len(numbers))
            nodes.append((str(node.func), _frozen((node.args, *node.kwargs.items()), numbers)))
        bases: dict[int, int] = {}
        facts = tuple(self._fact(value, claim, bases) for value in numbers)
        return claim.kind, claim.width, claim.eps, tuple(nodes), facts, numbers.get(claim.output)

    def _fact(self, value: int, claim: Claim, bases: dict[int, int]) -> Any:
        made = self.graph.values[value]
        inside = made.node in claim.inside
        # Two views of one value have the same beginning.
        base = -1 if inside else bases.setdefault(_base(self.graph, value), len(bases))
        return made.shape, made.origin, value in claim.others, base


def _base(graph: Graph, value: int) -> int:
    """What a cast or another view of the same begins with."""
    size = prod(graph.values[value].shape)
    while (node := graph.producer(value)) is not None and is_same(node):
        if prod(graph.values[node.inputs[0]].shape) != size:
            break  # its elements are repeated
        value = node.inputs[0]
    return value


def _frozen(tree: Any, numbers: dict[int, int]) -> Any:
    if isinstance(tree, Ref):
        return "value", numbers[tree.value]
    if isinstance(tree, (tuple, list)):
        return tuple(_frozen(item, numbers) for item in tree)
    return repr(tree)


@dataclass
class _Runner:
    """Runs the operations of a norm on x. `guessed` where a value of unknown content was read."""

    graph: Graph
    claim: Claim
    x: Tensor
    guessed: bool = False
    known: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known[self.claim.source] = self.x
        base = _base(self.graph, self.claim.source)
        self.known.setdefault(base, self.x.reshape(self.graph.values[base].shape))

    def value(self, number: int) -> Tensor:
        if number not in self.known:
            node = self.graph.producer(number)
            if number in self.claim.others or node is None:
                self.known[number] = self._stand_in(number)
            else:
                self._check(number, node)
                outputs = run(node, self.value)
                self.known.update(zip(node.outputs, outputs, strict=False))
        return self.known[number]

    def _stand_in(self, number: int) -> Tensor:
        """Ones for a gain; a small number for an ε that is a tensor."""
        made = self.graph.values[number]
        if number in self.claim.others:
            return torch.ones(made.shape, dtype=torch.float64)
        if made.origin not in ("constant", "parameter") or prod(made.shape) != 1:
            raise UnknownSpelling("it depends on another value")
        self.guessed = True
        return torch.full(made.shape, 1e-5, dtype=torch.float64)

    def _check(self, number: int, node: Node) -> None:
        """Nothing before the norm is run: only its own operations, views of x and constants."""
        inside = self.graph.values[number].node in self.claim.inside
        if not inside and not is_same(node) and node.inputs:
            raise UnknownSpelling("it depends on another value")


def _random(shape: Iterable[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def _probes(shape: tuple[int, ...], eps: float) -> Iterator[Tensor]:
    """Random rows around a mean that is not zero; ε weighs nothing, something and all of it."""
    for seed, size in enumerate((*_SIZES, eps**0.5 if eps else 1.0)):
        yield size * (_random(shape, seed) + 0.5)


def _are_close(found: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().amax()
    return bool(((found - expected).abs() <= _TOLERANCE * scale).all())
