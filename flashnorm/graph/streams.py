"""Who writes what a LayerNorm reads: centering the writers (E3) makes its mean zero.

A value is followed from where a parameter writes it along its features (a product, an embedding, a
bias, a table of positions) through sums, moves and factors per row to the norms that read it. Every
element carries the number of its feature (`gain_index.py`), every value the writers it comes from.
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
from flashnorm.graph.gain_index import Conflict, along, unify, varies
from flashnorm.graph.ir import Graph, Node, Ref
from flashnorm.graph.operations import CASTS, MOVES, RESHAPES
from flashnorm.graph.params import POINTWISE, ParamView
from flashnorm.graph.reads import is_whole
from flashnorm.graph.record import ALIAS_WRITE
from flashnorm.graph.rules import RULES, Indices
from flashnorm.graph.sites import NormCall
from flashnorm.graph.ties import can_be_untied, names_of, owned
from flashnorm.graph.unreached import IN_PART, Unreached
from flashnorm.plan import Centering, Entry

Tag = Centering | Entry
Tags = frozenset[Tag]


@dataclass
class Streams:
    """What is known after following every writer through a graph.

    `flow` numbers the features, `whole` knows gains and readings. `read` maps the index of every
    LayerNorm's node to the writers of its input, `refused` every writer that may not be centered to
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

    def begin(self, value: int, feature_index: Tensor, tag: Tag, node: Node | None) -> None:
        self.flow.indices[value] = feature_index
        self.tags[value] = self.tags.get(value, frozenset()) | {tag}
        if node is not None:
            self.writes[tag].add(id(node))


def find_streams(flow: Flow, entries: Mapping[int, Entry] | None = None) -> Streams:
    """Follow all writers of a graph whose gains were followed; `entries` are centered
    explicitly."""
    own = Flow(
        flow.graph, norm_calls=flow.norm_calls, views=flow.views, zeros=flow.zeros, roots=flow.roots
    )
    streams = Streams(own, flow, entries or {})
    inside = _insides(flow.norm_calls)
    for index, node in enumerate(flow.graph.nodes):
        norm_call = flow.norm_calls.get(index)
        if norm_call is not None and norm_call.centers:
            _read(streams, index, norm_call)
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


def _insides(norm_calls: Mapping[int, NormCall]) -> dict[int, NormCall]:
    """The nodes of LayerNorms themselves, whose reading of a stream is what they are for."""
    layers = [norm_call for norm_call in norm_calls.values() if norm_call.centers]
    return {index: norm_call for norm_call in layers for index in norm_call.inside}


def _refuse_leaks(streams: Streams, node: Node, inside: Mapping[int, NormCall]) -> None:
    """A statistic of a LayerNorm that is read outside of it would change."""
    for value in node.inputs:
        norm_call = inside.get(streams.graph.values[value].node)
        if norm_call is not None and value not in norm_call.node.outputs:
            streams.refuse(norm_call.source, f"a norm's statistic is also read by {node.where}")


def _read(streams: Streams, index: int, norm_call: NormCall) -> None:
    """A LayerNorm centers what it reads, if that is all features of a stream."""
    feature_index = streams.flow.indices.get(norm_call.source)
    if feature_index is None:
        return
    if varies(feature_index, -1) and feature_index.shape[-1] == norm_call.width:
        streams.read[index] = streams.tags[norm_call.source]
    else:
        where = norm_call.node.where
        streams.refuse(
            norm_call.source, f"a norm reads a part of what it writes, or more ({where})"
        )


def _follow(streams: Streams, node: Node) -> None:
    flow = streams.flow
    indexed = [v for v in node.inputs if v in flow.indices]
    if not indexed:
        if node.op in _SAME_RULE and (lost := [v for v in node.inputs if v in streams.broken]):
            streams.broken |= dict.fromkeys(node.outputs, streams.broken[lost[0]])
        return
    try:
        if node.op in _JOINS:
            _index_parameters(streams, node, indexed[0])
            indexed = [v for v in node.inputs if v in flow.indices]
        rule = _RULES.get(node.op)
        if rule is None:
            raise Blocked(f"what it writes is also read by {node.where}")
        results = rule(flow, node)
        _check_whole(flow, node, results)
    except Blocked as blocked:
        results = _refuse_all(streams, node, indexed, str(blocked))
    except Exception as error:
        reason = f"it could not be followed past {node.where} ({bug(error)})"
        results = _refuse_all(streams, node, indexed, reason)
    tags: Tags = frozenset().union(*(streams.tags[v] for v in indexed))
    for out, feature_index in zip(node.outputs, results, strict=False):
        if feature_index is not None:
            flow.indices[out], streams.tags[out] = feature_index, tags


def _check_whole(flow: Flow, node: Node, indices: Indices) -> None:
    """All features stay together: those of a part have a mean of their own."""
    counts = {len(_features(flow.indices[v])) for v in node.inputs if v in flow.indices}
    for feature_index in indices:
        if feature_index is None:
            continue
        features = _features(feature_index)
        whole = torch.equal(features.sort().values, torch.arange(1, len(features) + 1))
        if not whole or {len(features)} != counts:
            raise Blocked(f"a part of what it writes is read by itself ({node.where})")


def _features(feature_index: Tensor) -> Tensor:
    """The features along the one axis that has them; nothing where there is no such axis."""
    axes = [axis for axis in range(feature_index.ndim) if varies(feature_index, axis)]
    return along(feature_index, axes[0]) if len(axes) == 1 else feature_index.new_zeros(0)


def _refuse_all(streams: Streams, node: Node, values: list[int], reason: str) -> Indices:
    """Refuse the writers of all that a node reads; its outputs are reached by no stream."""
    for value in values:
        streams.refuse(value, reason)
    before = next((streams.broken[v] for v in node.inputs if v in streams.broken), reason)
    streams.broken |= dict.fromkeys(node.outputs, before)
    return []


def _index_parameters(streams: Streams, node: Node, like: int) -> None:
    """A parameter that is added to a stream, or put beside it, is a writer as well."""
    flow = streams.flow
    feature_index = flow.indices[like]
    axis = next((a for a in range(-feature_index.ndim, 0) if varies(feature_index, a)), None)
    for value in node.inputs:
        view = flow.views.get(value)
        if value in flow.indices or view is None or axis is None:
            continue
        shape = flow.graph.values[value].shape
        if (
            view.relation == POINTWISE
            or len(shape) < -axis
            or shape[axis] != feature_index.shape[axis]
        ):
            continue
        begin = _along_parameter(view, axis)
        if begin is not None:
            writer = Centering(_owned(flow, view.name, node), begin[0])
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
    """Start a stream with the values that an operation of its own centers."""
    for value in node.outputs:
        if value in streams.entries and value not in streams.flow.indices:
            shape = streams.graph.values[value].shape
            feature_index = _spread(torch.arange(shape[-1]), -1, shape)
            streams.begin(value, feature_index, streams.entries[value], None)


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
    if view is None or view.relation == POINTWISE or out in flow.indices:
        return
    begin = _along_parameter(view, view_axis)
    if begin is None or shape[out_axis] != len(begin[1]):
        return
    writers = [Centering(_owned(flow, view.name, node), begin[0])]
    if bias is not None:
        added = flow.views.get(bias)
        other = _along_parameter(added, -1) if added is not None else None
        if added is None or other is None or not torch.equal(other[1], begin[1]):
            return
        writers.append(Centering(_owned(flow, added.name, node), other[0]))
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
        if isinstance(tag, Centering):
            axes[tag.parameter].add(tag.axis)
    for tag, nodes in streams.writes.items():
        if not isinstance(tag, Centering):
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
        if isinstance(tag, Centering):
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
        if reason := unreached.module_elsewhere(whole.norm_calls[index].node.path):
            streams.kept[index] = reason


def _extents(streams: Streams) -> dict[Tag, tuple[int, set[str]]]:
    """For every writer how many features it has, and the modules that its stream passes by."""
    found: dict[Tag, tuple[int, set[str]]] = {}
    for node in streams.graph.nodes:
        for value in {*node.inputs, *node.outputs} & streams.tags.keys():
            for tag in streams.tags[value]:
                if tag not in found:
                    found[tag] = len(_features(streams.flow.indices[value])), set()
                found[tag][1].add(node.path)
    return found


def _join(flow: Flow, node: Node) -> Indices:
    """Sums of streams, feature by feature."""
    if len(node.inputs) < 2:
        raise Blocked(f"a number is added to what it writes ({node.where})")
    first, second = (flow.index_of(v) for v in node.inputs[:2])
    try:
        feature_index = unify(first, second)
    except Conflict:
        raise Blocked(
            f"what it writes is added to a value that no linear layer writes ({node.where})"
        ) from None
    return [feature_index.expand(flow.graph.values[node.outputs[0]].shape)]


def _factor(flow: Flow, node: Node) -> Indices:
    """A factor that is the same for all features keeps their mean at zero."""
    indexed = [v for v in node.inputs if v in flow.indices]
    feature_index = flow.indices[indexed[0]]
    others = [v for v in node.inputs if v not in flow.indices]
    shape = flow.graph.values[node.outputs[0]].shape
    axis = next((a for a in range(-feature_index.ndim, 0) if varies(feature_index, a)), -1)
    for other in others:
        sizes = flow.graph.values[other].shape
        if len(sizes) >= -axis and sizes[axis] != 1:
            raise Blocked(f"what it writes is multiplied feature by feature ({node.where})")
    if len(indexed) > 1 or (node.op == "div" and node.inputs[0] != indexed[0]):
        raise Blocked(f"what it writes is multiplied by another stream ({node.where})")
    if node.op == "div" and node.bound.get("rounding_mode"):
        raise Blocked(f"it is rounded ({node.where})")
    return [feature_index.expand(shape)]


def _contract(flow: Flow, node: Node) -> Indices:
    """A stream may be mixed over rows; what sums over its features reads it without a norm."""
    first, second, added = CONTRACTIONS[node.op](node)
    sides = [side for side in (first, second) if side.value in flow.indices]
    if len(sides) != 1 or added is not None or varies(flow.indices[sides[0].value], sides[0].axis):
        raise Blocked(f"what it writes is read without a norm by {node.where}")
    return [carry(flow, node, sides[0], flow.indices[sides[0].value])]


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
_RULES: dict[str, Callable[[Flow, Node], Indices]] = {
    **{op: RULES[op] for op in _SAME_RULE},
    **dict.fromkeys(("add", "sub"), _join),
    **dict.fromkeys(("mul", "div", "neg"), _factor),
    **dict.fromkeys(CONTRACTIONS, _contract),
}
