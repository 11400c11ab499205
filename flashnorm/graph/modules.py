"""Whether a module is a norm and nothing else, so that another one can take its place."""

from __future__ import annotations

import torch

from flashnorm.graph.flow import Flow
from flashnorm.graph.ir import Call, Node
from flashnorm.graph.operations import CASTS, RESHAPES
from flashnorm.graph.params import SAME
from flashnorm.graph.sites import NormCall, same_as
from flashnorm.kernels import norms


def is_replaceable(flow: Flow, norm_call: NormCall) -> bool:
    """Whether the module call that made this norm call computes `x / sqrt(mean square + ε)` of its
    argument, then a gain and a bias where it has them, each a whole parameter [width] in its order,
    and returns that."""
    call = flow.graph.calls.get(norm_call.node.call)
    if call is None or not norm_call.standard or not _is_function(flow, call, norm_call):
        return False
    found = _affine(flow, norm_call, call.returned[0], norm_call.node.call)
    if found is None:
        return False
    gain, bias = found
    names = [use.parameter for use in flow.uses_of(norm_call)]
    if names != ([gain] if gain else []):
        return False
    return not bias or any(b.parameter == bias for b in flow.norm_biases.get(gain, ()))


def _is_function(flow: Flow, call: Call, norm_call: NormCall) -> bool:
    """Whether the call gets the norm's source as its one argument, and returns as much."""
    if call.arguments != 1 or len(call.returned) != 1 or len(call.received) != 1:
        return False
    given, returned = (flow.graph.values[v[0]].shape for v in (call.received, call.returned))
    whole = norms.described(norm_call.kind).learns_alpha or given[-1:] == (norm_call.width,)
    if given != returned or not whole:
        return False
    return same_as(flow.graph, call.received[0]) == same_as(flow.graph, norm_call.source)


def _affine(flow: Flow, norm_call: NormCall, value: int, call: int) -> tuple[str, str] | None:
    """(gain, bias) where `value` is the norm's output times the gain plus the bias."""
    gain, bias = _whole(flow, norm_call, norm_call.gain), _whole(flow, norm_call, norm_call.bias)
    if gain is None or bias is None:
        return None
    after = ["", ""]  # what is applied after the norm's own operation
    while value != norm_call.output:
        node = flow.graph.producer(value)
        if node is None or node.call != call:
            return None
        if node.op in CASTS | RESHAPES:
            value = node.inputs[0]
            continue
        step = {"mul": 0, "add": 1}.get(node.op)
        operands = _operands(flow, node)
        # Backwards: the bias comes first, and each but once.
        if step is None or operands is None or after[step] or (step == 1 and after[0]):
            return None
        value, other = operands
        after[step] = _whole(flow, norm_call, other, exact=step == 1) or ""
        if not after[step]:
            return None
    if (gain or bias) and any(after):
        return None
    gain, bias = gain or after[0], bias or after[1]
    return None if bias and not gain else (gain, bias)


def _operands(flow: Flow, node: Node) -> tuple[int, int] | None:
    """(the norm's part, what is made of parameters)."""
    if len(node.inputs) != 2 or node.bound.get("alpha", 1) != 1:
        return None
    found = [v for v in node.inputs if flow.parameters_in(v) is None]
    own = [v for v in node.inputs if flow.parameters_in(v)]
    return (found[0], own[0]) if len(found) == len(own) == 1 else None


def _whole(flow: Flow, norm_call: NormCall, value: int | None, exact: bool = False) -> str | None:
    """The parameter [width] that a value shows from its first to its last element; "" of nothing.

    Where `exact` it is the parameter itself; a gain may also be a function of each element.
    """
    if value is None:
        return ""
    view = flow.views.get(value)
    elements = view.elements() if view is not None else None
    if view is None or elements is None or (exact and view.relation != SAME):
        return None
    shape = flow.graph.values[value].shape
    if (
        view.sizes != (norm_call.width,)
        or shape[-1:] != view.sizes
        or elements.numel() != norm_call.width
    ):
        return None
    return view.name if torch.equal(elements.flatten(), torch.arange(norm_call.width)) else None
