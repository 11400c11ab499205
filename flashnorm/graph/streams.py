"""Who writes what a LayerNorm reads: centring the writers (E3) makes its mean zero.

A value is followed from where a parameter writes it along its features (a product, an embedding, a
bias, a table of positions) through sums, moves and factors per row to the norms that read it. Every
element carries the number of its feature (`labels.py`), every value the writers it comes from.
Subtracting the mean over the features of all writers changes no LayerNorm's output; it is exact
where nothing else reads what they write.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashnorm.graph.contractions import CONTRACTIONS, carry, column
from flashnorm.graph.failures import Blocked, bug
from flashnorm.graph.flow import Flow
from flashnorm.graph.labels import Conflict, along, unify, varies
from flashnorm.graph.nouns import Graph, Node, Ref
from flashnorm.graph.operations import CASTS, MOVES, RESHAPES
from flashnorm.graph.params import POINTWISE, ParamView
from flashnorm.graph.reads import is_whole
from flashnorm.graph.record import ALIAS_WRITE
from flashnorm.graph.rules import RULES, Labels
from flashnorm.graph.sites import Visit
from flashnorm.graph.ties import can_be_untied, names_of, owned
from flashnorm.graph.unreached import IN_PART, Unreached
from flashnorm.plan import Centring, Entry

Tag = Centring | Entry
Tags = frozenset[Tag]


@dataclass
class Streams:
    """What is known after following every writer through a graph.

    `flow` labels the features, `whole` knows gains and readings. `read` maps the index of every
    LayerNorm's node to the writers of its input, `refused` every writer that may not be centred to
    the reason, `kept` every node that may not lose its mean.
    """

    flow: Flow
    whole: Flow
    entries: Mapping[int, Entry]
    tags: dict[int, Tags] = field(default_factory=dict)
    refused: dict[Tag, str] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)  # values that a stream did not reach, why
    writes: dict[Tag, set[int]] = field(default_factory=lambda: defaultdict(set))
    read: dict[int, Tags] = field(default_factory=dict)
    kept: dict[int, str] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.flow.graph

    def refuse(self, value: int, reason: str) -> None:
        for tag in self.tags.get(value, ()):
            self.refused.setdefault(tag, reason)

    def begin(self, value: int, label: Tensor, tag: Tag, node: Node | None) -> None:
        self.flow.labels[value] = label
        self.tags[value] = self.tags.get(value, frozenset()) | {tag}
        if node is not None:
            self.writes[tag].add(id(node))


def find_streams(flow: Flow, entries: Mapping[int, Entry] | None = None) -> Streams:
    """Follow all writers of a graph whose gains were followed; `entries` are centred explicitly."""
    own = Flow(flow.graph, visits=flow.visits, views=flow.views, zeros=flow.zeros, roots=flow.roots)
    streams = Streams(own, flow, entries or {})
    inside = _insides(flow.visits)
    for index, node in enumerate(flow.graph.nodes):
        visit = flow.visits.get(index)
        if visit is not None and visit.centres:
            _read(streams, index, visit)
        if index not in inside:
            _refuse_leaks(streams, node, inside)
            _follow(streams, node)
            _begin(streams, node)
        _enter(streams, node)
    for value in flow.graph.outputs:
        streams.refuse(value, "the model returns what it writes")
    _refuse_other_readings(streams)
    _refuse_unreached(streams)
    return streams


def _insides(visits: Mapping[int, Visit]) -> dict[int, Visit]:
    """The nodes of LayerNorms themselves, whose reading of a stream is what they are for."""
    layers = [visit for visit in visits.values() if visit.centres]
    return {index: visit for visit in layers for index in visit.inside}


def _refuse_leaks(streams: Streams, node: Node, inside: Mapping[int, Visit]) -> None:
    """A statistic of a LayerNorm that is read outside of it would change."""
    for value in node.inputs:
        visit = inside.get(streams.graph.values[value].node)
        if visit is not None and value not in visit.node.outputs:
            streams.refuse(visit.source, f"a norm's statistic is also read by {node.where}")


def _read(streams: Streams, index: int, visit: Visit) -> None:
    """A LayerNorm centres what it reads, if that is all features of a stream."""
    label = streams.flow.labels.get(visit.source)
    if label is None:
        return
    if varies(label, -1) and label.shape[-1] == visit.width:
        streams.read[index] = streams.tags[visit.source]
    else:
        where = visit.node.where
        streams.refuse(visit.source, f"a norm reads a part of what it writes, or more ({where})")


def _follow(streams: Streams, node: Node) -> None:
    flow = streams.flow
    labelled = [v for v in node.inputs if v in flow.labels]
    if not labelled:
        if node.op in _SAME_RULE and (lost := [v for v in node.inputs if v in streams.broken]):
            streams.broken |= dict.fromkeys(node.outputs, streams.broken[lost[0]])
        return
    try:
        if node.op in _JOINS:
            _label_parameters(streams, node, labelled[0])
            labelled = [v for v in node.inputs if v in flow.labels]
        rule = _RULES.get(node.op)
        if rule is None:
            raise Blocked(f"what it writes is also read by {node.where}")
        results = rule(flow, node)
        _check_whole(flow, node, results)
    except Blocked as blocked:
        results = _refuse_all(streams, node, labelled, str(blocked))
    except Exception as error:
        reason = f"it could not be followed past {node.where} ({bug(error)})"
        results = _refuse_all(streams, node, labelled, reason)
    tags: Tags = frozenset().union(*(streams.tags[v] for v in labelled))
    for out, label in zip(node.outputs, results, strict=False):
        if label is not None:
            flow.labels[out], streams.tags[out] = label, tags


def _check_whole(flow: Flow, node: Node, labels: Labels) -> None:
    """All features stay together: those of a part have a mean of their own."""
    counts = {len(_features(flow.labels[v])) for v in node.inputs if v in flow.labels}
    for label in labels:
        if label is None:
            continue
        features = _features(label)
        whole = torch.equal(features.sort().values, torch.arange(1, len(features) + 1))
        if not whole or {len(features)} != counts:
            raise Blocked(f"a part of what it writes is read by itself ({node.where})")


def _features(label: Tensor) -> Tensor:
    """The features along the one axis that has them; nothing where there is no such axis."""
    axes = [axis for axis in range(label.ndim) if varies(label, axis)]
    return along(label, axes[0]) if len(axes) == 1 else label.new_zeros(0)


def _refuse_all(streams: Streams, node: Node, values: list[int], reason: str) -> Labels:
    """Refuse the writers of all that a node reads; its outputs are reached by no stream."""
    for value in values:
        streams.refuse(value, reason)
    before = next((streams.broken[v] for v in node.inputs if v in streams.broken), reason)
    streams.broken |= dict.fromkeys(node.outputs, before)
    return []


def _label_parameters(streams: Streams, node: Node, like: int) -> None:
    """A parameter that is added to a stream, or put beside it, is a writer as well."""
    flow = streams.flow
    label = flow.labels[like]
    axis = next((a for a in range(-label.ndim, 0) if varies(label, a)), None)
    for value in node.inputs:
        view = flow.views.get(value)
        if value in flow.labels or view is None or axis is None:
            continue
        shape = flow.graph.values[value].shape
        if view.relation == POINTWISE or len(shape) < -axis or shape[axis] != label.shape[axis]:
            continue
        begin = _along_parameter(view, axis)
        if begin is not None:
            writer = Centring(_owned(flow, view.name, node), begin[0])
            streams.begin(value, _spread(begin[1], axis, shape), writer, node)


def _along_parameter(view: ParamView, axis: int) -> tuple[int, Tensor] | None:
    """The axis of the parameter that runs along `axis` of the view, if all of it does."""
    try:
        number, positions = column(view, axis)
    except Conflict:
        return None
    whole = torch.arange(view.sizes[number])
    return (number, positions) if torch.equal(positions.sort().values, whole) else None


def _spread(positions: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    lead = [1] * len(shape)
    lead[axis] = len(positions)
    return (positions + 1).view(lead).expand(shape)


def _owned(flow: Flow, name: str, node: Node) -> str:
    return owned(flow.graph, name, node) or name


def _enter(streams: Streams, node: Node) -> None:
    """Start a stream with the values that an operation of its own centres."""
    for value in node.outputs:
        if value in streams.entries and value not in streams.flow.labels:
            shape = streams.graph.values[value].shape
            label = _spread(torch.arange(shape[-1]), -1, shape)
            streams.begin(value, label, streams.entries[value], None)


def _begin(streams: Streams, node: Node) -> None:
    """Start a stream where a parameter writes all of its features."""
    for weight, view_axis, out_axis, bias in _written(streams.flow, node):
        _begin_at(streams, node, weight, view_axis, out_axis, bias)


def _begin_at(
    streams: Streams, node: Node, weight: int, view_axis: int, out_axis: int, bias: int | None
) -> None:
    flow, out = streams.flow, node.outputs[0]
    view = flow.views.get(weight)
    shape = flow.graph.values[out].shape
    if view is None or view.relation == POINTWISE or out in flow.labels:
        return
    begin = _along_parameter(view, view_axis)
    if begin is None or shape[out_axis] != len(begin[1]):
        return
    writers = [Centring(_owned(flow, view.name, node), begin[0])]
    if bias is not None:
        added = flow.views.get(bias)
        other = _along_parameter(added, -1) if added is not None else None
        if added is None or other is None or not torch.equal(other[1], begin[1]):
            return
        writers.append(Centring(_owned(flow, added.name, node), other[0]))
    for writer in writers:
        streams.begin(out, _spread(begin[1], out_axis, shape), writer, node)


def _written(flow: Flow, node: Node) -> list[tuple[int, int, int, int | None]]:
    """(parameter's value, its axis that is written, the output's axis, bias) of a writing node."""
    named = node.bound if node.op in _WRITERS else {}
    if node.op == "embedding":
        return [(named["weight"].value, -1, -1, None)]
    if node.op == "convolution":
        if named["groups"] != 1:
            return []  # each output feature reads other inputs, so their mean is not one product
        bias = named["bias"].value if isinstance(named["bias"], Ref) else None
        return [(named["weight"].value, 1 if named["transposed"] else 0, 1, bias)]
    if node.op not in CONTRACTIONS or not node.inputs:
        return []
    first, second, added = CONTRACTIONS[node.op](node)
    if node.op == "linear":
        return [(second.value, -2, -1, added)]
    if node.op == "mv":
        return []
    sides = [(second.value, -1, -1, added), (first.value, -2, -2, added)]
    return [side for side in sides if side[0] in flow.views][:1]


def _refuse_other_readings(streams: Streams) -> None:
    """A writer must be read as such and in no other way."""
    flow = streams.whole
    axes: dict[str, set[int]] = defaultdict(set)
    for tag in streams.writes:
        if isinstance(tag, Centring):
            axes[tag.parameter].add(tag.axis)
    for tag, nodes in streams.writes.items():
        if not isinstance(tag, Centring):
            continue
        name = names_of(flow.graph, tag.parameter)[0]
        for use in flow.uses.get(name, ()):
            if id(use.node) not in nodes and _owned(flow, name, use.node) == tag.parameter:
                reason = f"{tag.parameter} is also read by {use.node.where}"
                streams.refused.setdefault(tag, reason)
        if len(axes[tag.parameter]) > 1:
            streams.refused.setdefault(tag, f"{tag.parameter} writes along two of its axes")


def _refuse_unreached(streams: Streams) -> None:
    """Other inputs may write to the same stream or read it, or use a norm elsewhere."""
    whole, unreached = streams.whole, Unreached.of(streams.whole)
    for tag, (width, paths) in _extents(streams).items():
        reasons = [unreached.doubt(width, paths, *_DOUBTS)]
        if isinstance(tag, Centring):
            name = names_of(whole.graph, tag.parameter)[0]
            if not is_whole(whole.reads[name]):
                reasons.append(IN_PART.format(f"its writer {tag.parameter}"))
            parts = can_be_untied(whole, name)
            reasons.append(unreached.elsewhere("its writer", tag.parameter, parts))
        else:
            reasons.append(unreached.module_elsewhere(tag.path))
        if reason := next(filter(None, reasons), ""):
            streams.refused.setdefault(tag, reason)
    for index in streams.read:
        if reason := unreached.module_elsewhere(whole.visits[index].node.path):
            streams.kept[index] = reason


def _extents(streams: Streams) -> dict[Tag, tuple[int, set[str]]]:
    """For every writer how many features it has, and the modules that its stream passes by."""
    found: dict[Tag, tuple[int, set[str]]] = {}
    for node in streams.graph.nodes:
        for value in {*node.inputs, *node.outputs} & streams.tags.keys():
            for tag in streams.tags[value]:
                if tag not in found:
                    found[tag] = len(_features(streams.flow.labels[value])), set()
                found[tag][1].add(node.path)
    return found


def _join(flow: Flow, node: Node) -> Labels:
    """Sums of streams, feature by feature."""
    if len(node.inputs) < 2:
        raise Blocked(f"a number is added to what it writes ({node.where})")
    first, second = (flow.label_of(v) for v in node.inputs[:2])
    try:
        label = unify(first, second)
    except Conflict:
        raise Blocked(
            f"what it writes is added to a value that no linear layer writes ({node.where})"
        ) from None
    return [label.expand(flow.graph.values[node.outputs[0]].shape)]


def _factor(flow: Flow, node: Node) -> Labels:
    """A factor that is the same for all features keeps their mean at zero."""
    labelled = [v for v in node.inputs if v in flow.labels]
    label, others = flow.labels[labelled[0]], [v for v in node.inputs if v not in flow.labels]
    shape = flow.graph.values[node.outputs[0]].shape
    axis = next((a for a in range(-label.ndim, 0) if varies(label, a)), -1)
    for other in others:
        sizes = flow.graph.values[other].shape
        if len(sizes) >= -axis and sizes[axis] != 1:
            raise Blocked(f"what it writes is multiplied feature by feature ({node.where})")
    if len(labelled) > 1 or (node.op == "div" and node.inputs[0] != labelled[0]):
        raise Blocked(f"what it writes is multiplied by another stream ({node.where})")
    if node.op == "div" and node.bound.get("rounding_mode"):
        raise Blocked(f"it is rounded ({node.where})")
    return [label.expand(shape)]


def _contract(flow: Flow, node: Node) -> Labels:
    """A stream may be mixed over rows; what sums over its features reads it without a norm."""
    first, second, added = CONTRACTIONS[node.op](node)
    sides = [side for side in (first, second) if side.value in flow.labels]
    if len(sides) != 1 or added is not None or varies(flow.labels[sides[0].value], sides[0].axis):
        raise Blocked(f"what it writes is read without a norm by {node.where}")
    return [carry(flow, node, sides[0], flow.labels[sides[0].value])]


# What a matrix, and what a vector, that was not reached may do.
_DOUBTS = ("read or write the same stream", "be added to the same stream")
_JOINS = frozenset({"add", "sub", "cat", "stack", "copy", "index_put", "where"})
_WRITERS = frozenset({*CONTRACTIONS, "embedding"})
_SAME_RULE = (
    *CASTS,
    *MOVES,
    *RESHAPES,
    *("cat", "stack", "roll", "sum", "mean", "index", "index_select", "index_put", "index_add"),
    *("index_copy", "scatter", "scatter_add", "slice_scatter", "select_scatter", "copy"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty"),
    ALIAS_WRITE,
)
_RULES: dict[str, Callable[[Flow, Node], Labels]] = {
    **{op: RULES[op] for op in _SAME_RULE},
    **dict.fromkeys(("add", "sub"), _join),
    **dict.fromkeys(("mul", "div", "neg"), _factor),
    **dict.fromkeys(CONTRACTIONS, _contract),
}
