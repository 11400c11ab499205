"""Whether a module is a norm and nothing else, so that another one can take its place."""

from __future__ import annotations

from flashnorm.graph.flow import Flow
from flashnorm.graph.nouns import Node
from flashnorm.graph.operations import CASTS, RESHAPES
from flashnorm.graph.sites import Visit, same_as


def is_replaceable(flow: Flow, visit: Visit) -> bool:
    """Whether the call that made this visit computes `x / sqrt(mean square + ε)` of its argument,
    then a gain and a bias of its own where it has them, and returns that."""
    call = flow.graph.calls.get(visit.node.call)
    if call is None or not visit.standard or call.arguments != 1:
        return False
    if len(call.returned) != 1 or len(call.received) != 1:
        return False
    if same_as(flow.graph, call.received[0]) != same_as(flow.graph, visit.source):
        return False
    value: int | None = call.returned[0]
    while value is not None and value != visit.output:
        value = _before(flow, value, visit.node.call)
    return value == visit.output


def _before(flow: Flow, value: int, call: int) -> int | None:
    """The value that a cast, a gain or a bias was applied to within the call."""
    node = flow.graph.producer(value)
    if node is None or node.call != call:
        return None
    if node.op in CASTS | RESHAPES:
        return node.inputs[0]
    return _operand(flow, node) if node.op in ("mul", "add") else None


def _operand(flow: Flow, node: Node) -> int | None:
    """The one operand that is not computed from parameters alone."""
    found = [v for v in node.inputs if flow.parameters_in(v) is None]
    own = [v for v in node.inputs if flow.parameters_in(v)]
    return found[0] if len(found) == len(own) == 1 else None
