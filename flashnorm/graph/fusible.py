"""Which modules are operations that kernels have: linear layers, gated pairs of them, their norms.

By what a module was seen to do in every recorded call, never by its class or name. A module that
did anything else beside it (a counter, a check of its values) is none of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from flashnorm.graph.affine import NOT_ALONE, Normed, Unfit, normed
from flashnorm.graph.ambient import on_cpu
from flashnorm.graph.ir import Call, Graph, Node
from flashnorm.graph.sites import find_norm_calls, same_as
from flashnorm.graph.within import Within

SPLITS = frozenset({"split", "split_with_sizes"})


@dataclass(frozen=True)
class Linear:
    """A module that returns `x Wᵀ (+ c)` of its one argument: the names of its parameters.

    Where it is `turned` it holds Wᵀ: [in, out].
    """

    path: str
    weight: str
    bias: str = ""
    turned: bool = False


@dataclass(frozen=True)
class Rows:
    """Rows `start : start + length` of the weight of the linear module at `path`."""

    path: str
    start: int
    length: int


@dataclass(frozen=True)
class Gated:
    """A module that returns `down(act(gate(x)) ⊙ up(x))` of its one argument."""

    path: str
    gate: Rows
    up: Rows
    down: str
    activation: str


@dataclass
class Fusible:
    """`readers` maps a module to the linear and gated modules that are always given its output.

    `unfit` says why a module with a norm in it is none; `kept` are the dtypes in which a module was
    called and returned what it was given, `given` the shape of its first argument.
    """

    linears: dict[str, Linear] = field(default_factory=dict)
    turned: dict[str, Linear] = field(default_factory=dict)
    gated: dict[str, Gated] = field(default_factory=dict)
    norms: dict[str, Normed] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kept: dict[str, frozenset[torch.dtype]] = field(default_factory=dict)
    given: dict[str, tuple[int, ...]] = field(default_factory=dict)


@on_cpu()
def find_fusible(graph: Graph) -> Fusible:
    """What of a recorded model the kernels can take as it is."""
    calls: dict[str, list[int]] = defaultdict(list)
    for number, call in graph.calls.items():
        calls[call.path].append(number)
    found, within = Fusible(), Within(graph)
    for path, numbers in calls.items():
        for value in graph.calls[numbers[0]].received[:1]:
            found.given[path] = graph.values[value].shape
        found.kept[path] = _kept(graph, [graph.calls[number] for number in numbers])
        kinds = {_linear(graph, number, within) for number in numbers}
        if len(kinds) == 1 and (linear := kinds.pop()):
            (found.turned if linear.turned else found.linears)[path] = linear
    makers = _Makers(graph, found)
    for path, numbers in calls.items():
        gates = {_gated(makers, number, within) for number in numbers}
        if len(gates) == 1 and (gated := gates.pop()):
            found.gated[path] = gated
    _find_norms(found, graph, calls, within)
    _find_readers(found, graph, calls)
    return found


def _kept(graph: Graph, calls: Sequence[Call]) -> frozenset[torch.dtype]:
    """The dtypes that were given in a call and returned in every call with them."""
    given: set[torch.dtype] = set()
    changed: set[torch.dtype] = set()
    for call in calls:
        dtypes = {graph.values[value].dtype for value in call.received}
        given |= dtypes
        if {graph.values[value].dtype for value in call.returned} != dtypes:
            changed |= dtypes
    return frozenset(given - changed)


def _find_norms(found: Fusible, graph: Graph, calls: dict[str, list[int]], within: Within) -> None:
    norm_calls = find_norm_calls(graph)
    for path in dict.fromkeys(norm_call.node.path for norm_call in norm_calls.values()):
        try:
            norms = {normed(graph, number, norm_calls, within) for number in calls[path]}
        except Unfit as error:
            found.unfit[path] = str(error)
            continue
        if len(norms) == 1:
            found.norms[path] = norms.pop()
        else:
            found.unfit[path] = NOT_ALONE


def _linear(graph: Graph, number: int, within: Within) -> Linear | None:
    """The layer that a call is."""
    call = graph.calls[number]
    if not _is_simple(call):
        return None
    node = graph.producer(same_as(graph, call.returned[0]))
    if node is None or node.call != number or (operands := _product(graph, node)) is None:
        return None
    x, weight, bias, turned = operands
    if x != same_as(graph, call.received[0]) or not within.is_pure(number):
        return None
    widths = graph.values[graph.parameters[weight]].shape
    fits = _fits(graph, call, widths, turned)
    return Linear(call.path, weight, bias, turned) if fits else None


def _fits(graph: Graph, call: Call, widths: Sequence[int], turned: bool) -> bool:
    """Whether row by row of x makes row by row of the result: none was merged or repeated."""
    given, made = (graph.values[v].shape for v in (call.received[0], call.returned[0]))
    width, rows = widths if turned else widths[::-1]
    return given[:-1] == made[:-1] and given[-1:] == (width,) and made[-1:] == (rows,)


def _is_simple(call: Call) -> bool:
    return len(call.received) == len(call.returned) == call.arguments == 1


def _product(graph: Graph, node: Node) -> tuple[int, str, str, bool] | None:
    """(x, weight, bias, turned) of `x Wᵀ (+ c)` with a whole parameter W, and c [k] or no name."""
    named = node.bound
    if node.op == "mm":
        x, right, added = named["self"], named["mat2"], None
    elif node.op == "addmm" and named["alpha"] == named["beta"] == 1:
        x, right, added = named["mat1"], named["mat2"], named["self"]
    else:
        return None
    transpose = graph.producer(right.value)
    turned = transpose is None or not _turns(transpose)
    weight = graph.values[right.value if transpose is None or turned else transpose.inputs[0]]
    bias = None if added is None else graph.values[added.value]
    if weight.origin != "parameter" or len(weight.shape) != 2:
        return None
    if bias is None:
        return same_as(graph, x.value), weight.parameter, "", turned
    if bias.origin != "parameter" or bias.shape != (weight.shape[1 if turned else 0],):
        return None
    return same_as(graph, x.value), weight.parameter, bias.parameter, turned


def _turns(node: Node) -> bool:
    """Whether an operation exchanges the two axes of a matrix."""
    if node.op == "transpose":
        named = node.bound
        return named["dim0"] % 2 != named["dim1"] % 2
    return node.op == "t"


class _Makers:
    """Which linear module made a value, and from what."""

    def __init__(self, graph: Graph, found: Fusible) -> None:
        self.graph = graph
        self._made: dict[int, Call] = {}
        for call in graph.calls.values():
            if call.path in found.linears:
                self._made[same_as(graph, call.returned[0])] = call

    def whole(self, value: int) -> Call | None:
        return self._made.get(same_as(self.graph, value))

    def rows(self, value: int, x: int) -> Rows | None:
        """The linear module and rows that `value` comes from, where it read x."""
        value = same_as(self.graph, value)
        length = self.graph.values[value].shape[-1]
        start, whole = 0, value
        node = self.graph.producer(value)
        if node is not None and (part := _part(self.graph, node, value)) is not None:
            start, whole = part, node.inputs[0]
        call = self.whole(whole)
        if call is None or same_as(self.graph, call.received[0]) != x:
            return None
        return Rows(call.path, start, length)


def _part(graph: Graph, node: Node, value: int) -> int | None:
    """Where on the last axis a slice or a part of a split begins."""
    last = len(graph.values[node.inputs[0]].shape) - 1 if node.inputs else -1
    if node.op in SPLITS and node.bound["dim"] in (-1, last):
        widths = [graph.values[output].shape[-1] for output in node.outputs]
        return sum(widths[: node.outputs.index(value)])
    if node.op == "slice" and node.bound["dim"] in (-1, last) and node.bound["step"] == 1:
        start = node.bound["start"] or 0
        return start if start >= 0 else None
    return None


def _gated(makers: _Makers, number: int, within: Within) -> Gated | None:
    graph, call = makers.graph, makers.graph.calls[number]
    if not _is_simple(call) or not within.is_pure(number):
        return None
    x, down = same_as(graph, call.received[0]), makers.whole(call.returned[0])
    if down is None or down.path == call.path:
        return None
    given, made = (graph.values[v].shape for v in (call.received[0], call.returned[0]))
    if given[:-1] != made[:-1] or made != graph.values[down.returned[0]].shape:
        return None
    node = graph.producer(same_as(graph, down.received[0]))
    if node is None or node.op != "mul" or len(node.inputs) != 2 or node.call != number:
        return None
    for first, second in (node.inputs, node.inputs[::-1]):
        gate, activation = _activated(graph, first)
        if not activation:
            continue
        rows = makers.rows(gate, x), makers.rows(second, x)
        if rows[0] and rows[1] and rows[0].length == rows[1].length:
            return Gated(call.path, rows[0], rows[1], down.path, activation)
    return None


def _activated(graph: Graph, value: int) -> tuple[int, str]:
    """(what an activation was applied to, its name among the kernels'), or no name."""
    node = graph.producer(same_as(graph, value))
    if node is None or node.op not in ("silu", "relu", "gelu"):
        return value, ""
    tanh = node.op == "gelu" and node.bound["approximate"] == "tanh"
    return node.inputs[0], "gelu_tanh" if tanh else node.op


def _find_readers(found: Fusible, graph: Graph, calls: dict[str, list[int]]) -> None:
    """A reader counts where every call of the module that made the value is followed by it."""
    given: dict[int, set[str]] = defaultdict(set)
    for path in (*found.linears, *found.turned, *found.gated):
        for number in calls[path]:
            given[graph.calls[number].received[0]].add(path)
    inner = set(_inner(found))
    for path, numbers in calls.items():
        returned = [graph.calls[number].returned for number in numbers]
        if any(len(values) != 1 for values in returned):
            continue
        common = set.intersection(*(given[values[0]] for values in returned)) - inner
        if common:
            found.readers[path] = tuple(sorted(common))


def _inner(found: Fusible) -> Iterator[str]:
    """The linear modules that run as a part of a gated one."""
    for gated in found.gated.values():
        yield from (gated.gate.path, gated.up.path)
