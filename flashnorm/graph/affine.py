"""Whether a module is `norm(x) · (offset + gain) + bias` with whole parameters, and with which.

Gain and bias are evaluated as for folding (`gains.convention`): as functions of one parameter each,
element by element in its order. A buffer, a view or a permutation is neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashnorm.graph.flow import Flow, GainUse
from flashnorm.graph.gains import NotAffine, convention
from flashnorm.graph.nouns import Call, Graph, Node, Ref
from flashnorm.graph.operations import CASTS, RESHAPES
from flashnorm.graph.params import ParamView
from flashnorm.graph.sites import Visit, same_as
from flashnorm.graph.within import Within
from flashnorm.kernels import norms
from flashnorm.plan import Gain

NOT_ALONE = "its module does more than this norm, or takes more than one argument"
NOT_AFFINE = (
    "what it multiplies by is not a number plus a whole parameter of {} elements, in its order"
)
NOT_BIAS = "what it adds is not a whole parameter of {} elements, in its order"
NOT_KIND = "the kernels have no {} norm by itself"


@dataclass(frozen=True)
class Normed:
    """A module that returns `norm(x) · (offset + gain) + bias` of its one argument: parameters."""

    path: str
    kind: str
    width: int
    eps: float
    gain: str = ""
    offset: float = 0.0
    bias: str = ""


class Unfit(Exception):
    """A module is not such a norm; the text says why."""


def normed(graph: Graph, number: int, visits: Mapping[int, Visit], within: Within) -> Normed:
    """The norm that a call is. Raises Unfit."""
    call = graph.calls[number]
    own = [visits[index] for index in within.nodes(number) if index in visits]
    if len(own) != 1 or not _is_alone(graph, call, own[0]) or not within.is_pure(number):
        raise Unfit(NOT_ALONE)
    visit = own[0]
    if not norms.described(visit.kind).scales:
        raise Unfit(NOT_KIND.format(visit.kind))
    if not visit.standard or visit.eps is None:
        raise Unfit(NOT_ALONE)
    gain, bias = _factors(graph, visit, call.returned[0])
    # As a number times a gain that is a parameter; a norm without one has neither.
    found = Gain("") if gain is None else _affine(graph, visit, gain, NOT_AFFINE)
    added = Gain("") if bias is None else _affine(graph, visit, bias, NOT_BIAS)
    if found.scale != 1.0:
        raise Unfit(NOT_AFFINE.format(visit.width))
    if (added.offset, added.scale) != (0.0, 1.0):
        raise Unfit(NOT_BIAS.format(visit.width))
    eps, width = float(visit.eps), visit.width
    return Normed(call.path, visit.kind, width, eps, found.parameter, found.offset, added.parameter)


def _is_alone(graph: Graph, call: Call, visit: Visit) -> bool:
    """Whether the call has one argument, of which the last axis is normalized, and one result."""
    if not len(call.received) == len(call.returned) == call.arguments == 1:
        return False
    given, made = (graph.values[v] for v in (call.received[0], call.returned[0]))
    same = same_as(graph, call.received[0]) == same_as(graph, visit.source)
    return same and given.shape == made.shape and given.shape[-1:] == (visit.width,)


def _factors(graph: Graph, visit: Visit, value: int) -> tuple[int | None, int | None]:
    """(what the norm's output is multiplied by, what is added to that), each if there is one."""
    gain, bias = visit.gain, visit.bias
    fused = gain is not None or bias is not None
    while value != visit.output:
        node = graph.producer(value)
        if node is None:
            raise Unfit(NOT_ALONE)
        if node.op in CASTS or (node.op in RESHAPES and _keeps_features(graph, node)):
            value = node.inputs[0]
            continue
        if fused or node.op not in ("mul", "add") or node.bound.get("alpha", 1) != 1:
            raise Unfit(NOT_ALONE)
        value, other = _operands(graph, node, visit)
        if gain is not None or (node.op == "add" and bias is not None):
            raise Unfit(NOT_ALONE)
        gain, bias = (other, bias) if node.op == "mul" else (gain, other)
    return gain, bias


def _keeps_features(graph: Graph, node: Node) -> bool:
    before, after = graph.values[node.inputs[0]], graph.values[node.outputs[0]]
    return before.shape[-1:] == after.shape[-1:]


def _operands(graph: Graph, node: Node, visit: Visit) -> tuple[int, int]:
    """(what comes from the norm, the factor or summand) of a product or sum of two tensors."""
    sides = node.args[:2]
    if len(sides) != 2 or not all(isinstance(side, Ref) for side in sides):
        raise Unfit(NOT_ALONE)
    first, second = (side.value for side in sides)
    for value, other in ((first, second), (second, first)):
        if _comes_from(graph, value, visit.output) and not _comes_from(graph, other, visit.source):
            return value, other
    raise Unfit(NOT_ALONE)


def _comes_from(graph: Graph, value: int, source: int) -> bool:
    """Whether a value depends on another one."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        if (current := waiting.pop()) == source:
            return True
        if current not in seen and (node := graph.producer(current)) is not None:
            waiting += node.inputs
        seen.add(current)
    return False


def _affine(graph: Graph, visit: Visit, value: int, reason: str) -> Gain:
    """A value as `offset + scale · p`, element i by element i of a parameter p of the width."""
    name = _parameter(graph, value)
    shown = graph.values[value].shape
    if not name or graph.values[graph.parameters[name]].shape != (visit.width,):
        raise Unfit(reason.format(visit.width))
    if shown[-1:] != (visit.width,) or any(size != 1 for size in shown[:-1]):
        raise Unfit(reason.format(visit.width))
    views = {value: ParamView.of(name, (visit.width,))}
    try:
        return convention(Flow(graph, views=views), GainUse(visit, name, value))
    except NotAffine as error:
        raise Unfit(reason.format(visit.width)) from error


def _parameter(graph: Graph, value: int) -> str:
    """The one parameter, with nothing else, that a value is computed from; empty if none is."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        node, held = graph.producer(current), graph.values[current]
        if node is None:
            found.add(held.parameter if held.origin == "parameter" else "")
        else:
            waiting += node.inputs
    return found.pop() if len(found) == 1 else ""
