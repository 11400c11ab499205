"""Where the scale of every norm is needed: after a product, later, or nowhere (E4, E7, E8, E12).

A norm's output is `s · x`, s one number per row. What reads it linearly may take x and multiply its
own outputs by s. Every output feature of such a reader is followed: a norm that reads it undoes any
factor per row (E7), a ReLU and a product pass the factor on (E8, E12), and where anything else
reads it the factor must be there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashnorm.graph.contractions import CONTRACTIONS
from flashnorm.graph.failures import Blocked, bug
from flashnorm.graph.flow import Flow
from flashnorm.graph.gain_index import NONE, Conflict, unify, varies, without_repeats
from flashnorm.graph.ir import Graph, Node
from flashnorm.graph.operations import CASTS, MOVES, RESHAPES
from flashnorm.graph.rules import RULES, Indices
from flashnorm.graph.sites import NormCall, same_as
from flashnorm.kernels import norms

BIASED = "its bias is added after the scale"


@dataclass
class ReaderUse:
    """One product of a norm's output with a parameter; feature j has the index `base + j`.

    `path` is the module that is this product and nothing else, if there is one, and `call` the call
    of it. `needed` marks the
    features that the scale must be on at once, for `reason`; `later` those for which it is early
    enough after the product with the parameter `after`, which gives `after_features`.
    """

    norm: int  # index of the norm's node
    parameter: str
    path: str
    call: int
    base: int
    features: int
    needed: Tensor
    later: Tensor
    reason: str = ""
    after: str = ""
    after_features: int = 0


@dataclass(frozen=True)
class Renormed:
    """A norm that reads scaled features; axis `rows[i]` of its input is the i-th row axis of x."""

    index: int
    indices: Tensor
    rows: tuple[int, ...]


@dataclass
class Scales:
    """What is known after following every scale through a graph.

    `direct` maps values that are a norm's output to the norm, `partners` a product of scaled values
    to the indices of all factors, `refused` a norm to what else reads it than linear layers.
    """

    flow: Flow
    rows: Flow
    direct: dict[int, int] = field(default_factory=dict)
    readers: list[ReaderUse] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # the first index of each
    partners: dict[int, Tensor] = field(default_factory=dict)
    renormed: list[Renormed] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.flow.graph

    def features(self, value: int) -> Tensor:
        """The indices that a value carries, some of them perhaps more than once."""
        found = without_repeats(self.flow.indices[value]).flatten()
        return found[found > NONE]

    def by_reader(self, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The number of every reader that these indices name, and which of its features."""
        if not len(indices):
            return
        first = bisect_right(self.starts, int(indices.min())) - 1
        last = bisect_right(self.starts, int(indices.max())) - 1
        for number in range(first, last + 1):
            mine = indices - self.starts[number]
            mine = mine[(mine >= 0) & (mine < self.readers[number].features)]
            if len(mine):
                yield number, mine

    def involved(self, value: int) -> Tensor:
        """All indices whose scale is on a value."""
        found, others = self.features(value), self.partners.get(value)
        return found if others is None else torch.cat([found, others])


def find_scales(flow: Flow, outputs: Mapping[int, int]) -> Scales:
    """Follow the scale of every norm; `outputs` maps its returned value to its node's index."""
    scales = Scales(_like(flow), _like(flow), direct=dict(outputs))
    inside = _insides(flow.norm_calls)
    for index, node in enumerate(flow.graph.nodes):
        norm_call = flow.norm_calls.get(index)
        if norm_call is not None and norms.described(norm_call.kind).undone:
            _renorm(scales, index, norm_call)
        if index in inside:
            continue
        if any(value in scales.direct for value in node.inputs):
            _read(scales, node)
        else:
            _follow(scales, node)
    for value in flow.graph.outputs:
        if value in scales.flow.indices:
            _need(scales, [value], "the model returns it")
        if value in scales.direct:
            scales.refused.setdefault(scales.direct[value], "the model returns it")
    _settle(scales)
    return scales


def _like(flow: Flow) -> Flow:
    shared = {
        "norm_calls": flow.norm_calls,
        "views": flow.views,
        "zeros": flow.zeros,
        "roots": flow.roots,
    }
    return Flow(flow.graph, **shared)  # type: ignore[arg-type]


def _insides(norm_calls: Mapping[int, NormCall]) -> set[int]:
    found: set[int] = set()
    for norm_call in norm_calls.values():
        if norms.described(norm_call.kind).undone:
            found |= norm_call.inside
    return found


def _read(scales: Scales, node: Node) -> None:
    """A reader of a norm's own output: a product with a parameter, or a reason against deferral."""
    graph, direct = scales.graph, [v for v in node.inputs if v in scales.direct]
    if len(direct) > 1 or any(value in scales.flow.indices for value in node.inputs):
        _refuse_all(scales, node)
        return
    norm, out = scales.direct[direct[0]], node.outputs[0]
    shape = graph.values[direct[0]].shape
    same_width = graph.values[out].shape[-1:] == shape[-1:]
    same_shape = node.op == "slice" and graph.values[out].shape == shape
    if node.op in CASTS or (node.op in RESHAPES and same_width) or same_shape:
        scales.direct[out] = norm
        return
    side = _parameter_side(scales, node, direct[0])
    if side is None:
        scales.refused.setdefault(norm, f"it is also read by {node.where}")
        return
    parameter, biased = side
    features, rows = graph.values[out].shape[-1], graph.values[out].shape[:-1]
    base = scales.readers[-1].base + scales.readers[-1].features if scales.readers else 1
    masks = (torch.full((features,), biased), torch.zeros(features, dtype=torch.bool))
    path, reason = _linear_path(graph, node, direct[0]), BIASED if biased else ""
    use = ReaderUse(norm, parameter, path, node.call, base, features, *masks, reason)
    scales.readers.append(use)
    scales.starts.append(base)
    if biased:
        return
    lead = torch.arange(1, 1 + torch.Size(rows).numel()).view(*rows, 1)
    scales.flow.indices[out] = torch.arange(base, base + features).expand(*rows, features)
    scales.rows.indices[out] = lead.expand(*rows, features)


def _refuse_all(scales: Scales, node: Node) -> None:
    """Several scaled values meet: each must have its scale."""
    for value in node.inputs:
        if value in scales.direct:
            scales.refused.setdefault(scales.direct[value], f"it is also read by {node.where}")
        if value in scales.flow.indices:
            _need(scales, [value], f"it is read by {node.where}")


def _parameter_side(scales: Scales, node: Node, value: int) -> tuple[str, bool] | None:
    """(parameter, whether a bias is added) where `value` is the left side of a plain product."""
    if node.op not in ("linear", "mm", "addmm"):
        return None
    first, second, added = CONTRACTIONS[node.op](node)
    view = scales.flow.views.get(second.value)
    if first.value != value or view is None or added in scales.direct:
        return None
    return view.name, added is not None


def _linear_path(graph: Graph, node: Node, value: int) -> str:
    """The module whose call is this product of its argument, and returns it."""
    call = graph.calls.get(node.call)
    if call is None or len(call.received) != 1 or len(call.returned) != 1:
        return ""
    if same_as(graph, call.received[0]) != same_as(graph, value):
        return ""
    return call.path if same_as(graph, call.returned[0]) == node.outputs[0] else ""


def _renorm(scales: Scales, index: int, norm_call: NormCall) -> None:
    """A norm over features that all carry the scale of one row undoes it (E7)."""
    feature_index, rows = (f.indices.get(norm_call.source) for f in (scales.flow, scales.rows))
    if feature_index is None or rows is None:
        return
    where, mixed = norm_call.node.where, norm_call.source in scales.partners
    if (
        mixed
        or not norm_call.standard
        or bool((without_repeats(feature_index) <= NONE).any())
        or varies(rows, -1)
    ):
        _need(scales, [norm_call.source], f"a norm reads it beside other values ({where})")
    elif (axes := _row_axes(rows)) is None:
        _need(scales, [norm_call.source], f"its rows are in another order there ({where})")
    else:
        scales.renormed.append(Renormed(index, scales.features(norm_call.source), axes))


def _row_axes(rows: Tensor) -> tuple[int, ...] | None:
    """The axes along which the rows run in their own order, numbered from 1; else None."""
    axes = tuple(axis for axis in range(rows.ndim) if rows.shape[axis] > 1 and varies(rows, axis))
    shape = [rows.shape[axis] if axis in axes else 1 for axis in range(rows.ndim)]
    expected = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)
    return axes if bool((without_repeats(rows) == without_repeats(expected)).all()) else None


def _follow(scales: Scales, node: Node) -> None:
    indexed = [v for v in node.inputs if v in scales.flow.indices]
    if not indexed:
        return
    if node.op in CONTRACTIONS and (parameter := _later(scales, node, indexed)):
        for number, features in scales.by_reader(scales.involved(indexed[0])):
            scales.readers[number].later[features] = True
            scales.readers[number].after = parameter
            scales.readers[number].after_features = scales.graph.values[node.outputs[0]].shape[-1]
        return
    rule = _RULES.get(node.op)
    try:
        if rule is None:
            raise Blocked(f"it is read by {node.where}")
        indices, rows = rule(scales.flow, node), _ROW_RULES[node.op](scales.rows, node)
    except (Blocked, Conflict):
        _need(scales, indexed, f"it is read by {node.where}")
        return
    except Exception as error:
        _need(scales, indexed, f"it is read by {node.where} ({bug(error)})")
        return
    partners = _partners(scales, node, indexed)
    for out, feature_index, row in zip(node.outputs, indices, rows, strict=False):
        if feature_index is not None and row is not None:
            scales.flow.indices[out], scales.rows.indices[out] = feature_index, row
            if partners is not None:
                scales.partners[out] = partners


def _partners(scales: Scales, node: Node, indexed: list[int]) -> Tensor | None:
    """The indices of all factors of a product of scaled values, and of what is made of one."""
    is_product = node.op == "mul" and len(indexed) > 1
    if not is_product and not any(value in scales.partners for value in indexed):
        return None
    return torch.unique(torch.cat([scales.involved(value) for value in indexed]))


def _later(scales: Scales, node: Node, indexed: list[int]) -> str:
    """The parameter of a second product, if the scale of all that it sums can wait for it."""
    try:
        first, second, added = CONTRACTIONS[node.op](node)
    except Blocked:
        return ""
    view = scales.flow.views.get(second.value)
    if view is None or indexed != [first.value] or added is not None:
        return ""
    feature_index = scales.flow.indices[first.value]
    whole = varies(feature_index, first.axis) and not bool(
        (without_repeats(feature_index) <= NONE).any()
    )
    return view.name if whole and not varies(scales.rows.indices[first.value], first.axis) else ""


def _need(scales: Scales, values: list[int], reason: str) -> None:
    for value in values:
        for number, features in scales.by_reader(scales.involved(value)):
            reader = scales.readers[number]
            reader.needed[features] = True
            reader.reason = reader.reason or reason


def _settle(scales: Scales) -> None:
    """A norm that reads one scaled feature needs all of its features scaled."""
    changed = True
    while changed:
        changed = False
        for renormed in scales.renormed:
            parts = [(scales.readers[n], f) for n, f in scales.by_reader(renormed.indices)]
            marks = [bool((reader.needed | reader.later)[f].any()) for reader, f in parts]
            if any(marks) and not all(bool(reader.needed[f].all()) for reader, f in parts):
                changed = True
                for reader, features in parts:
                    reader.needed[features] = True


def _sum(flow: Flow, node: Node) -> Indices:
    """Sums of values that carry the scale of the same row."""
    if len(node.inputs) < 2:
        raise Blocked("a number is added")
    first, second = (flow.index_of(v) for v in node.inputs[:2])
    return [unify(first, second).expand(flow.graph.values[node.outputs[0]].shape)]


def _product(flow: Flow, node: Node) -> Indices:
    """A factor without the scale leaves its degree; two with it add theirs (E8)."""
    indexed = [v for v in node.inputs if v in flow.indices]
    return [flow.indices[indexed[0]].expand(flow.graph.values[node.outputs[0]].shape)]


def _quotient(flow: Flow, node: Node) -> Indices:
    if len(node.inputs) > 1 and node.inputs[1] in flow.indices:
        raise Blocked("it is divided by")
    return _product(flow, node)


def _row_product(flow: Flow, node: Node) -> Indices:
    """Both factors must carry the scale of the same row."""
    if len([v for v in node.inputs if v in flow.indices]) > 1:
        return _sum(flow, node)
    return _product(flow, node)


_RULES: dict[str, Callable[[Flow, Node], Indices]] = {
    **{op: RULES[op] for op in (*CASTS, *MOVES, *RESHAPES, "cat", "stack")},
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "neg", "relu", "abs"), _product),
    "div": _quotient,
}
_ROW_RULES = {**_RULES, "mul": _row_product}
