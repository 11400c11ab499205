"""Whether a module is a norm and nothing else, so that another one can take its place."""

from __future__ import annotations

from flashnorm.graph.flow import Flow, GainUse
from flashnorm.graph.gains import NotAffine, convention
from flashnorm.graph.nouns import Call
from flashnorm.graph.operations import CASTS, RESHAPES
from flashnorm.graph.sites import Visit, same_as
from flashnorm.plan import Gain


def is_replaceable(flow: Flow, visit: Visit) -> bool:
    """Whether the call that made this visit computes `x / sqrt(mean square + ε)` of its argument,
    then a gain and a bias of its own where it has them, and returns that.

    A gain is `offset + p` and a bias is `p`, with all of a parameter p in its order: what replaces
    the module reads p itself.
    """
    call = flow.graph.calls.get(visit.node.call)
    if call is None or not visit.standard or not _is_whole(flow, call, visit):
        return False
    found = _affine(flow, visit, call.returned[0])
    if found is None:
        return False
    gain, bias = found
    plain = gain is None or _parameter(flow, visit, gain, (0.0, 1.0))
    return plain and (bias is None or _parameter(flow, visit, bias, (0.0,)))


def _is_whole(flow: Flow, call: Call, visit: Visit) -> bool:
    """Whether it has one argument, all of whose last axis is normalized, and one result like it."""
    if not len(call.returned) == len(call.received) == call.arguments == 1:
        return False
    values = flow.graph.values
    given, made = (values[v].shape for v in (call.received[0], call.returned[0]))
    same = same_as(flow.graph, call.received[0]) == same_as(flow.graph, visit.source)
    return same and given == made and given[-1:] == (visit.width,)


def _affine(flow: Flow, visit: Visit, value: int) -> tuple[int | None, int | None] | None:
    """What the norm's output is multiplied by, and what is then added to it; None where the call
    does anything else."""
    gain, bias = visit.gain, visit.bias
    fused = gain is not None or bias is not None
    while value != visit.output:
        node = flow.graph.producer(value)
        if node is None or node.call != visit.node.call:
            return None
        if node.op in CASTS | RESHAPES:
            value = node.inputs[0]
            continue
        operands = _operands(flow, node.inputs) if node.op in ("mul", "add") else None
        if operands is None or fused or gain is not None or node.bound.get("alpha", 1) != 1:
            return None
        value, other = operands
        if node.op == "mul":
            gain = other
        elif bias is None:
            bias = other
        else:
            return None
    return gain, bias


def _operands(flow: Flow, inputs: tuple[int, ...]) -> tuple[int, int] | None:
    """(what depends on an input of the model, what is computed from parameters alone)."""
    found = [v for v in inputs if flow.parameters_in(v) is None]
    own = [v for v in inputs if flow.parameters_in(v)]
    return (found[0], own[0]) if len(found) == len(own) == 1 else None


def _parameter(flow: Flow, visit: Visit, value: int, offsets: tuple[float, ...]) -> bool:
    """Whether a value is `offset + p`: a parameter with an element per feature, in its order."""
    view = flow.views.get(value)
    shape = flow.graph.values[value].shape
    if view is None or view.sizes != (visit.width,) or shape != (visit.width,):
        return False
    try:
        found = convention(flow, GainUse(visit, view.name, value))
    except NotAffine:
        return False
    elements = view.elements()
    in_order = elements is not None and bool((elements.diff() == 1).all())
    return in_order and found in [Gain(view.name, offset) for offset in offsets]
