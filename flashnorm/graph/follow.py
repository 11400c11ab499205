"""Following gains: from where a norm multiplies by one to every contraction that can absorb it.

An abstract interpretation over the recorded graph in execution order. Every value may carry gain
indices (`gain_index.py`), show a parameter (`params.py`), or be a norm's output that waits for its
gain. An operation with no rule refuses the gains that reach it, so that what is not understood is
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm.graph import params
from flashnorm.graph.contractions import CONTRACTIONS, record_uses
from flashnorm.graph.expand import expanded
from flashnorm.graph.factors import SAME, operation
from flashnorm.graph.failures import Blocked, bug
from flashnorm.graph.flow import EarlyGain, Flow, GainUse, Use
from flashnorm.graph.gain_index import FREE, NONE, without_repeats
from flashnorm.graph.ir import Graph, Node
from flashnorm.graph.operations import CASTS, MOVES, RESHAPES
from flashnorm.graph.params import ParamView
from flashnorm.graph.rules import RULES
from flashnorm.graph.sites import NormCall, find_norm_calls

# More elements than any norm's gain has: what multiplies by more is not a gain.
_LARGEST_GAIN = 1 << 22
# A norm's output stays one on its way to the gain.
CARRYING = CASTS | RESHAPES | MOVES
# A sum `z·g + β` stays one when it is only moved; anything else would have to move β as well.
_MOVING = CARRYING | {"cat", "stack", "index", "index_select"}
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"})
ONE_NUMBER = "its gain {} is one number, which stays where it is"
_FILLS = frozenset({"full", "full_like", "new_full", "fill"})


def follow(graph: Graph) -> Flow:
    """Find the norms of a graph and follow every gain to all of its readers."""
    graph = expanded(graph)
    flow = Flow(graph, norm_calls=find_norm_calls(graph))
    _seed(flow)
    for index, node in enumerate(graph.nodes):
        _follow_constants(flow, node)
        _drop_indices(flow, index, node)
        _follow_indices(flow, node)
        _follow_parameters(flow, index, node)
        _follow_norm(flow, node, flow.norm_calls.get(index))
    for value in graph.outputs:
        if value in flow.indices:
            made = graph.producer(value)
            flow.refuse(
                flow.indices[value], f"the model returns its output ({made and made.where})"
            )
    return flow


def _seed(flow: Flow) -> None:
    for norm_call in flow.norm_calls.values():
        _expect(flow, norm_call)
    for number, value in enumerate(flow.graph.values):
        known = {"input": None, "parameter": frozenset({value.parameter})}
        flow.roots.append(known.get(value.origin, frozenset()))
        if value.origin == "parameter":
            flow.views[number] = ParamView.of(value.parameter, value.shape)


def _expect(flow: Flow, norm_call: NormCall) -> None:
    """Where to start the gain that is part of a norm's product, if there is just one."""
    large = [(at, value) for at, value in norm_call.early if not _is_number(flow, value)]
    if len(large) == 1:
        at, value = large[0]
        flow.early[at].append(EarlyGain(norm_call, value))
        for index in norm_call.passing:
            flow.passing[index].append(norm_call)


def _drop_indices(flow: Flow, index: int, node: Node) -> None:
    """Within a norm only the gain that is part of it goes on; what x carries ends here."""
    if not (norm_calls := flow.passing.get(index)):
        return
    own = {use.parameter for norm_call in norm_calls for use in flow.uses_of(norm_call)}
    for value in node.inputs:
        gain_index = flow.indices.get(value)
        if gain_index is not None and not own & set(flow.gains_in(gain_index)):
            flow.refuse(gain_index, f"its output is normalized again ({node.where})")
            del flow.indices[value]


def _follow_constants(flow: Flow, node: Node) -> None:
    roots: frozenset[str] | None = frozenset()
    for value in node.inputs:
        known = flow.roots[value]
        roots = None if roots is None or known is None else roots | known
    for out in node.outputs:
        flow.roots[out] = roots
        if _is_zero(flow, node):
            flow.zeros.add(out)


def _is_zero(flow: Flow, node: Node) -> bool:
    if node.op in _ZEROS:
        return True
    if node.op in _FILLS:
        return node.bound.get("fill_value", node.bound.get("value")) == 0
    if node.op == "copy":
        return node.args[1].value in flow.zeros
    return node.op in SAME | MOVES and node.inputs[0] in flow.zeros


def _follow_indices(flow: Flow, node: Node) -> None:
    indexed = [v for v in node.inputs if v in flow.indices]
    if not indexed:
        return
    for value in indexed:
        for name in flow.gains_in(flow.indices[value]):
            flow.touched[name].add(node.path)
    rule = RULES.get(node.op)
    try:
        if rule is None:
            raise Blocked(f"its output is read by {node.where}, where a gain cannot be moved past")
        results = rule(flow, node)
        _check_not_rounded(flow, node, results)
    except Blocked as blocked:
        _refuse_all(flow, indexed, str(blocked))
        return
    except Exception as error:
        reason = f"it could not be followed past {node.where} ({bug(error)})"
        _refuse_all(flow, indexed, reason)
        return
    for out, gain_index in zip(node.outputs, results, strict=False):
        if gain_index is not None and bool((without_repeats(gain_index) == FREE).all()):
            flow.zeros.add(out)
        elif gain_index is not None and bool((without_repeats(gain_index) > NONE).any()):
            flow.indices[out] = gain_index
            if any(value in flow.biased for value in indexed):
                flow.biased.add(out)
            if node.op in _MOVING and all(value in flow.sums for value in indexed):
                flow.sums.add(out)


def _check_not_rounded(flow: Flow, node: Node, results: list[Tensor | None]) -> None:
    """A cast to integers, or a copy into them, does not commute with a gain."""
    for out, gain_index in zip(node.outputs, results, strict=False):
        dtype = flow.graph.values[out].dtype
        if gain_index is not None and not (dtype.is_floating_point or dtype.is_complex):
            raise Blocked(f"it is rounded to {dtype} ({node.where})")


def _refuse_all(flow: Flow, values: list[int], reason: str) -> None:
    for value in values:
        flow.refuse(flow.indices[value], reason)


def _follow_parameters(flow: Flow, index: int, node: Node) -> None:
    """Pass parameter views on; note every other reading of a parameter."""
    if not any(value in flow.views for value in node.inputs):
        return
    derived = params.derive(flow.graph, node, flow.views)
    if derived is not None:
        flow.views.update(zip(node.outputs, derived, strict=False))
        return
    for value in () if flow.graph.is_idle(node) else node.inputs:
        if value in flow.views:
            flow.reads[flow.views[value].name].append(flow.views[value])
    if node.op in CONTRACTIONS:
        record_uses(flow, node)
    elif not _is_early_gain(flow, index, node) and not _is_gain_use(flow, node):
        for value in node.inputs:
            if value in flow.views:
                flow.uses[flow.views[value].name].append(Use(node, other=True))


def _is_early_gain(flow: Flow, index: int, node: Node) -> bool:
    """Whether this multiplies a part of a norm by its gain; if so, its gain indices start there."""
    for early in flow.early.get(index, ()):
        view = flow.views.get(early.value)
        multiplies = operation(node) == "mul" or node.inputs[0] == early.value
        if view is not None and multiplies:
            return _start(flow, node, [early.norm_call], view, early.value)
    return False


def _is_gain_use(flow: Flow, node: Node) -> bool:
    """Whether this multiplies a norm's output by a gain; if so, start the gain's gain indices
    there."""
    if operation(node) != "mul" or len(node.inputs) != 2:
        return False
    for x, factor in (node.inputs, node.inputs[::-1]):
        view = flow.views.get(factor)
        if x in flow.pending and view is not None and 1 < view.numel <= _LARGEST_GAIN:
            norm_calls = [v for v in flow.pending[x] if _may_have(flow, v, factor)]
            return bool(norm_calls) and _start(flow, node, norm_calls, view, factor)
    return False


def _may_have(flow: Flow, norm_call: NormCall, gain: int) -> bool:
    """Shares of a whole, such as the weights of experts, are often scaled by what an index picked;
    a norm's gain has an element of its own for each feature."""
    view = flow.views.get(gain)
    elements = view.elements() if view is not None else None
    return (
        norm_call.kind != "other" or elements is None or bool((elements != elements[..., :1]).any())
    )


def _start(
    flow: Flow, node: Node, norm_calls: list[NormCall], view: ParamView, factor: int
) -> bool:
    elements = view.elements()
    if elements is None:
        return False
    out = node.outputs[0]
    if out in flow.indices:
        flow.refuse(flow.indices[out], f"its output is normalized again ({node.where})")
    base = flow.base(view.name)
    flow.indices[out] = (elements + base).expand(flow.graph.values[out].shape)
    flow.touched[view.name].add(node.path)
    for norm_call in norm_calls:
        flow.gains.append(GainUse(norm_call, view.name, factor))
    flow.pending.pop(out, None)
    return True


def _follow_norm(flow: Flow, node: Node, norm_call: NormCall | None) -> None:
    """Start norms, and carry a norm's output to its gain through casts, views and other factors."""
    if norm_call is not None:
        _begin(flow, node, norm_call)
        return
    out = node.outputs[0] if node.outputs else None
    if out is None or out in flow.indices:
        return
    waiting = [v for v in node.inputs if v in flow.pending]
    if len(waiting) != 1:
        return
    norm_calls = flow.pending[waiting[0]]
    if operation(node) in ("mul", "div"):
        _note_odd(flow, node, norm_calls, waiting[0])
    if node.op in CARRYING or _is_other_term(flow, node, waiting[0]):
        flow.pending[out] = norm_calls


def _begin(flow: Flow, node: Node, norm_call: NormCall) -> None:
    """A norm's output: with its gain where that is part of it, else waiting for one."""
    if norm_call.gain is not None:
        flow.indices.pop(norm_call.output, None)
        _start_fused(flow, node, norm_call)
        return
    if flow.uses_of(norm_call) and norm_call.output in flow.indices:
        return
    flow.indices.pop(norm_call.output, None)
    if any(not _is_number(flow, value) for _, value in norm_call.early):
        names = _names(flow, [value for _, value in norm_call.early])
        flow.odd[id(norm_call)] = f"its gain is made of {names} in a way that cannot be followed"
        return
    if norm_call.early:
        names = _names(flow, [value for _, value in norm_call.early])
        flow.odd[id(norm_call)] = ONE_NUMBER.format(names)
    flow.pending[norm_call.output] = [norm_call]


def _note_odd(flow: Flow, node: Node, norm_calls: list[NormCall], x: int) -> None:
    """A norm's output is multiplied by what is made of parameters and is no gain that moves."""
    others = [v for v in node.inputs if v != x and flow.parameters_in(v)]
    if not others:
        return
    names = _names(flow, others)
    if _is_number(flow, others[0]):
        reason = ONE_NUMBER.format(names)
    elif operation(node) == "div":
        reason = f"it is divided by its gain {names}, or divides it ({node.where})"
    else:
        reason = f"its gain is made of {names} in a way that cannot be followed ({node.where})"
    for norm_call in norm_calls:
        if _may_have(flow, norm_call, others[0]):
            flow.odd.setdefault(id(norm_call), reason)


def _names(flow: Flow, values: list[int]) -> str:
    found = [name for value in values for name in sorted(flow.parameters_in(value) or ())]
    return ", ".join(dict.fromkeys(found))


def _is_number(flow: Flow, value: int) -> bool:
    return torch.Size(flow.graph.values[value].shape).numel() == 1


def _is_other_term(flow: Flow, node: Node, x: int) -> bool:
    """A product with, or a quotient by, what is no gain: a gate, a number. Also a sum with
    parameters or constants before the gain: the gain multiplies both."""
    op, others = operation(node), [v for v in node.inputs if v != x]
    if op in ("mul", "div") and (op == "mul" or node.inputs[0] == x):
        return all(not flow.parameters_in(v) or _is_number(flow, v) for v in others)
    first = bool(node.inputs) and node.inputs[0] == x
    if op not in ("add", "sub") or (op == "sub" and not first):
        return False
    return all(flow.parameters_in(value) is not None for value in others)


def _start_fused(flow: Flow, node: Node, norm_call: NormCall) -> None:
    assert norm_call.gain is not None
    view = flow.views.get(norm_call.gain)
    if view is None or not _start(flow, node, [norm_call], view, norm_call.gain):
        names = _names(flow, [norm_call.gain])
        if names:
            flow.odd[id(norm_call)] = (
                f"its gain is made of {names} in a way that cannot be followed"
            )
        return
    uses = flow.uses[view.name]
    uses[:] = [use for use in uses if use.node is not node]
    if norm_call.bias is not None:
        flow.add_norm_bias(flow.indices[norm_call.output], norm_call.bias, node)
