"""Whether a module is `norm(x) · (offset + gain) + bias` with whole parameters, and with which.

norm(x) may be tanh(αx), where α is a whole parameter of one element. Gain and bias are evaluated as
for folding (`gains.convention`): as functions of one parameter each, element by element in its
order. A buffer, a view or a permutation is neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flashnorm.graph.flow import Flow, GainUse
from flashnorm.graph.gains import NotAffine, convention
from flashnorm.graph.ir import Call, Graph, Node, Ref
from flashnorm.graph.operations import CASTS, RESHAPES
from flashnorm.graph.params import ParamView
from flashnorm.graph.sites import NormCall, same_as
from flashnorm.graph.within import Within
from flashnorm.kernels import norms
from flashnorm.plan import Gain

NOT_ALONE = "its module does more than this norm, or takes more than one argument"
NOT_AFFINE = (
    "what it multiplies by is not a number plus a whole parameter of {} elements, in its order"
)
NOT_BIAS = "what it adds is not a whole parameter of {} elements, in its order"
NOT_KIND = "the kernels have no {} norm by itself"
NOT_DYNAMIC = "it is not tanh(αx) of its one argument, with α a whole parameter of one element"


@dataclass(frozen=True)
class Normed:
    """A module that returns `norm(x) · (offset + gain) + bias` of its one argument: parameters.

    `alpha` is that of tanh(αx), empty for any other norm.
    """

    path: str
    kind: str
    width: int
    eps: float
    gain: str = ""
    offset: float = 0.0
    bias: str = ""
    alpha: str = ""


class Unfit(Exception):
    """A module is not such a norm; the text says why."""


def normed(graph: Graph, number: int, norm_calls: Mapping[int, NormCall], within: Within) -> Normed:
    """The norm that a call is. Raises Unfit."""
    call, nodes = graph.calls[number], within.nodes(number)
    own = [norm_calls[index] for index in nodes if index in norm_calls]
    if len(own) != 1 or not within.is_pure(number):
        raise Unfit(NOT_ALONE)
    norm_call, alpha = own[0], ""
    if norms.described(norm_call.kind).learns_alpha:
        norm_call, alpha = _dynamic(graph, call, norm_call, nodes)
    if not _is_alone(graph, call, norm_call):
        raise Unfit(NOT_ALONE)
    if not (alpha or norms.described(norm_call.kind).scales):
        raise Unfit(NOT_KIND.format(norm_call.kind))
    if not norm_call.standard or norm_call.eps is None:
        raise Unfit(NOT_ALONE)
    gain, bias = _factors(graph, norm_call, call.returned[0])
    # As a number times a gain that is a parameter; a norm without one has neither.
    found = Gain("") if gain is None else _affine(graph, norm_call, gain, NOT_AFFINE)
    added = Gain("") if bias is None else _affine(graph, norm_call, bias, NOT_BIAS)
    if found.scale != 1.0:
        raise Unfit(NOT_AFFINE.format(norm_call.width))
    if (added.offset, added.scale) != (0.0, 1.0):
        raise Unfit(NOT_BIAS.format(norm_call.width))
    eps, width = float(norm_call.eps), norm_call.width
    parameters = (found.parameter, found.offset, added.parameter, alpha)
    return Normed(call.path, norm_call.kind, width, eps, *parameters)


def _dynamic(
    graph: Graph, call: Call, norm_call: NormCall, nodes: Sequence[int]
) -> tuple[NormCall, str]:
    """(a norm tanh(αx) as one of the call's argument, the name of α).

    As it was found it is one of whatever x is a multiple of, which may lie before the call.
    """
    argument = [same_as(graph, value) for value in call.received[:1]]
    into = same_as(graph, norm_call.node.inputs[0])
    product = graph.producer(into)
    if norm_call.node.op != "tanh" or product is None or graph.values[into].node not in nodes:
        raise Unfit(NOT_DYNAMIC)
    if product.op != "mul" or len(product.inputs) != 2:
        raise Unfit(NOT_DYNAMIC)
    for x, factor in (product.inputs, product.inputs[::-1]):
        held = graph.values[same_as(graph, factor)]
        if [same_as(graph, x)] != argument or held.origin != "parameter":
            continue
        if held.shape in ((), (1,)):
            width = graph.values[call.received[0]].shape[-1]
            own = replace(norm_call, width=width, eps=0.0, source=argument[0], standard=True)
            return own, held.parameter
    raise Unfit(NOT_DYNAMIC)


def _is_alone(graph: Graph, call: Call, norm_call: NormCall) -> bool:
    """Whether the call has one argument, of which the last axis is normalized, and one result."""
    if not len(call.received) == len(call.returned) == call.arguments == 1:
        return False
    given, made = (graph.values[v] for v in (call.received[0], call.returned[0]))
    same = same_as(graph, call.received[0]) == same_as(graph, norm_call.source)
    return same and given.shape == made.shape and given.shape[-1:] == (norm_call.width,)


def _factors(graph: Graph, norm_call: NormCall, value: int) -> tuple[int | None, int | None]:
    """(what the norm's output is multiplied by, what is added to that), each if there is one."""
    gain, bias = norm_call.gain, norm_call.bias
    fused = gain is not None or bias is not None
    while value != norm_call.output:
        node = graph.producer(value)
        if node is None:
            raise Unfit(NOT_ALONE)
        if node.op in CASTS or (node.op in RESHAPES and _keeps_features(graph, node)):
            value = node.inputs[0]
            continue
        if fused or node.op not in ("mul", "add") or node.bound.get("alpha", 1) != 1:
            raise Unfit(NOT_ALONE)
        value, other = _operands(graph, node, norm_call)
        if gain is not None or (node.op == "add" and bias is not None):
            raise Unfit(NOT_ALONE)
        gain, bias = (other, bias) if node.op == "mul" else (gain, other)
    return gain, bias


def _keeps_features(graph: Graph, node: Node) -> bool:
    before, after = graph.values[node.inputs[0]], graph.values[node.outputs[0]]
    return before.shape[-1:] == after.shape[-1:]


def _operands(graph: Graph, node: Node, norm_call: NormCall) -> tuple[int, int]:
    """(what comes from the norm, the factor or summand) of a product or sum of two tensors."""
    sides = node.args[:2]
    if len(sides) != 2 or not all(isinstance(side, Ref) for side in sides):
        raise Unfit(NOT_ALONE)
    first, second = (side.value for side in sides)
    for value, other in ((first, second), (second, first)):
        if _comes_from(graph, value, norm_call.output) and not _comes_from(
            graph, other, norm_call.source
        ):
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


def _affine(graph: Graph, norm_call: NormCall, value: int, reason: str) -> Gain:
    """A value as `offset + scale · p`, element i by element i of a parameter p of the width."""
    name = _parameter(graph, value)
    shown = graph.values[value].shape
    if not name or graph.values[graph.parameters[name]].shape != (norm_call.width,):
        raise Unfit(reason.format(norm_call.width))
    if shown[-1:] != (norm_call.width,) or any(size != 1 for size in shown[:-1]):
        raise Unfit(reason.format(norm_call.width))
    views = {value: ParamView.of(name, (norm_call.width,))}
    try:
        return convention(Flow(graph, views=views), GainUse(norm_call, name, value))
    except NotAffine as error:
        raise Unfit(reason.format(norm_call.width)) from error


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
