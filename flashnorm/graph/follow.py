"""Following gains: from where a norm multiplies by one to every contraction that can absorb it.

An abstract interpretation over the recorded graph in execution order. Every value may carry labels
(`labels.py`), show a parameter (`params.py`), or be a norm's output that waits for its gain. An
operation with no rule refuses the gains that reach it, so that what is not understood is kept.
"""

from __future__ import annotations

from torch import Tensor

from flashnorm.graph import params
from flashnorm.graph.contractions import CONTRACTIONS, record_uses
from flashnorm.graph.flow import Blocked, Flow, GainUse, Use
from flashnorm.graph.labels import FREE, NONE, without_repeats
from flashnorm.graph.nouns import Graph, Node
from flashnorm.graph.operations import CASTS, MOVES, RESHAPES
from flashnorm.graph.params import ParamView
from flashnorm.graph.rules import RULES
from flashnorm.graph.sites import SAME, Visit, find_visits

# More elements than any norm's gain has: what multiplies by more is not a gain.
_LARGEST_GAIN = 1 << 22
# A norm's output stays one on its way to the gain.
CARRYING = CASTS | RESHAPES | MOVES
# A sum `z·g + β` stays one when it is only moved; anything else would have to move β as well.
_MOVING = CARRYING | {"cat", "stack", "index", "index_select"}
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"})
_FILLS = frozenset({"full", "full_like", "new_full", "fill"})


def follow(graph: Graph) -> Flow:
    """Find the norms of a graph and follow every gain to all of its readers."""
    flow = Flow(graph, visits=find_visits(graph))
    _seed(flow)
    for index, node in enumerate(graph.nodes):
        _follow_constants(flow, node)
        _follow_labels(flow, node)
        _follow_parameters(flow, node)
        _follow_norm(flow, node, flow.visits.get(index))
    for value in graph.outputs:
        if value in flow.labels:
            made = graph.producer(value)
            flow.refuse(flow.labels[value], f"the model returns its output ({made and made.where})")
    return flow


def _seed(flow: Flow) -> None:
    for number, value in enumerate(flow.graph.values):
        known = {"input": None, "parameter": frozenset({value.parameter})}
        flow.roots.append(known.get(value.origin, frozenset()))
        if value.origin == "parameter":
            flow.views[number] = ParamView.of(value.parameter, value.shape)


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


def _follow_labels(flow: Flow, node: Node) -> None:
    labelled = [v for v in node.inputs if v in flow.labels]
    if not labelled:
        return
    for value in labelled:
        for name in flow.gains_in(flow.labels[value]):
            flow.touched[name].add(node.path)
    rule = RULES.get(node.op)
    try:
        if rule is None:
            raise Blocked(f"its output is read by {node.where}, where a gain cannot be moved past")
        results = rule(flow, node)
        _check_not_rounded(flow, node, results)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        # A spelling of the operation that its rule does not know: not understood, so kept.
        failure = f"{type(error).__name__}: {error}"
        _refuse_all(flow, labelled, f"it could not be followed past {node.where} ({failure})")
        return
    except Blocked as blocked:
        _refuse_all(flow, labelled, str(blocked))
        return
    for out, label in zip(node.outputs, results, strict=False):
        if label is not None and bool((without_repeats(label) == FREE).all()):
            flow.zeros.add(out)
        elif label is not None and bool((without_repeats(label) > NONE).any()):
            flow.labels[out] = label
            if node.op in _MOVING and all(value in flow.sums for value in labelled):
                flow.sums.add(out)


def _check_not_rounded(flow: Flow, node: Node, results: list[Tensor | None]) -> None:
    """A cast to integers, or a copy into them, does not commute with a gain."""
    for out, label in zip(node.outputs, results, strict=False):
        dtype = flow.graph.values[out].dtype
        if label is not None and not (dtype.is_floating_point or dtype.is_complex):
            raise Blocked(f"it is rounded to {dtype} ({node.where})")


def _refuse_all(flow: Flow, values: list[int], reason: str) -> None:
    for value in values:
        flow.refuse(flow.labels[value], reason)


def _follow_parameters(flow: Flow, node: Node) -> None:
    """Pass parameter views on; note every other reading of a parameter."""
    if not any(value in flow.views for value in node.inputs):
        return
    derived = params.derive(flow.graph, node, flow.views)
    if derived is not None:
        flow.views.update(zip(node.outputs, derived, strict=False))
        return
    # What had no rows was not computed: an expert that no token was sent to.
    idle = any(0 in flow.graph.values[out].shape for out in node.outputs)
    for value in () if idle else node.inputs:
        if value in flow.views:
            flow.reads[flow.views[value].name].append(flow.views[value])
    if node.op in CONTRACTIONS:
        record_uses(flow, node)
    elif not _is_gain_use(flow, node):
        for value in node.inputs:
            if value in flow.views:
                flow.uses[flow.views[value].name].append(Use(node, other=True))


def _is_gain_use(flow: Flow, node: Node) -> bool:
    """Whether this multiplies a norm's output by a gain; if so, start the gain's labels there."""
    if node.op != "mul" or len(node.inputs) != 2:
        return False
    for x, factor in (node.inputs, node.inputs[::-1]):
        view = flow.views.get(factor)
        if x in flow.pending and view is not None and 1 < view.numel <= _LARGEST_GAIN:
            return _start(flow, node, flow.pending[x], view, factor)
    return False


def _start(flow: Flow, node: Node, visits: list[Visit], view: ParamView, factor: int) -> bool:
    elements = view.elements()
    if elements is None:
        return False
    out = node.outputs[0]
    if out in flow.labels:
        flow.refuse(flow.labels[out], f"its output is normalized again ({node.where})")
    base = flow.base(view.name)
    flow.labels[out] = (elements + base).expand(flow.graph.values[out].shape)
    flow.touched[view.name].add(node.path)
    for visit in visits:
        flow.gains.append(GainUse(visit, view.name, factor))
    flow.pending.pop(out, None)
    return True


def _follow_norm(flow: Flow, node: Node, visit: Visit | None) -> None:
    """Start norms, and carry a norm's output to its gain through casts, views and other factors."""
    if visit is not None:
        flow.labels.pop(visit.output, None)
        if visit.gain is not None:
            _start_fused(flow, node, visit)
        else:
            flow.pending[visit.output] = [visit]
        return
    out = node.outputs[0] if node.outputs else None
    if out is None or out in flow.labels:
        return
    waiting = [v for v in node.inputs if v in flow.pending]
    if len(waiting) == 1 and (node.op in CARRYING or _is_other_factor(flow, node, waiting[0])):
        flow.pending[out] = flow.pending[waiting[0]]


def _is_other_factor(flow: Flow, node: Node, x: int) -> bool:
    """A product with, or a quotient by, something that is no parameter: a gate, a number."""
    if node.op not in ("mul", "div") or (node.inputs[0] != x and node.op == "div"):
        return False
    return all(other == x or other not in flow.views for other in node.inputs)


def _start_fused(flow: Flow, node: Node, visit: Visit) -> None:
    assert visit.gain is not None
    view = flow.views.get(visit.gain)
    if view is None or not _start(flow, node, [visit], view, visit.gain):
        return
    uses = flow.uses[view.name]
    uses[:] = [use for use in uses if use.node is not node]
    if visit.bias is not None:
        flow.add_shift(flow.labels[visit.output], visit.bias, node)
