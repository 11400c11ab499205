"""Which LayerNorms need no mean, once the writers of what they read are centered (E3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from flashnorm.graph.flow import Flow
from flashnorm.graph.ir import Call, Graph
from flashnorm.graph.sites import same_as
from flashnorm.graph.streams import Streams, Tags, find_streams
from flashnorm.graph.ties import can_be_untied, copies, names_of
from flashnorm.kernels import norms
from flashnorm.plan import Centering, Entry, Plan, Site

NOT_LINEAR = "what it reads is not written by linear layers alone ({})"
WITHOUT_MEAN = "hidden states taken from a centered stream come without their mean"
PACKED = "its writer {} is quantized ({}): what is subtracted from it does not fit its scales"
UNTIE = "; untie it (--untie) to center"
# An operation of its own at the beginning of a stream must save more than the one it costs.
_SAVES = 2
_MOST_TRIES = 8


def centered(plan: Plan, flow: Flow, norm_calls: Sequence[Sequence[int]], untie: bool) -> Plan:
    """The plan with its LayerNorms centered where that is exact; `norm_calls` are those of each
    site."""
    centers = [norms.described(site.kind).centers for site in plan.sites]
    layers = [v if own else () for own, v in zip(centers, norm_calls, strict=True)]
    if not any(layers):
        return plan
    streams, entries = _with_entries(flow, layers, untie)
    tags = [_tags(streams, nodes, untie) for nodes in layers]
    sites = tuple(
        _site(site, found, streams, nodes, untie)
        for site, found, nodes in zip(plan.sites, tags, layers, strict=True)
    )
    used = dict.fromkeys(tag for found in tags for tag in _ordered(found or ()))
    writers = tuple(tag for tag in used if isinstance(tag, Centering))
    return replace(
        plan,
        sites=sites,
        centerings=writers,
        entries=tuple(entry for entry in entries if entry in used),
        untied=tuple(sorted({*plan.untied, *copies(flow.graph, (w.parameter for w in writers))})),
        notes=(*plan.notes, *((WITHOUT_MEAN,) if writers else ())),
    )


def _ordered(tags: Tags | tuple[()]) -> list[Centering | Entry]:
    return sorted(tags, key=str)


def _tags(streams: Streams, nodes: Sequence[int], untie: bool) -> Tags | None:
    """The writers of all that a LayerNorm reads; None where one of them cannot be centered."""
    if not nodes or any(i not in streams.read or i in streams.kept for i in nodes):
        return None
    found: Tags = frozenset().union(*(streams.read[index] for index in nodes))
    return None if any(_refusal(streams, tag, untie) for tag in found) else found


def _refusal(streams: Streams, tag: Centering | Entry, untie: bool) -> str:
    if tag in streams.refused:
        return streams.refused[tag]
    if isinstance(tag, Entry):
        return ""
    names = names_of(streams.graph, tag.parameter)
    if (origin := streams.graph.packed.get(names[0])) is not None:
        return PACKED.format(tag.parameter, origin)
    if len(names) == 1 or (untie and can_be_untied(streams.whole, names[0])):
        return ""
    other = names[names[0] == tag.parameter]
    return f"its writer {tag.parameter} is tied to {other}{'' if untie else UNTIE}"


def _site(
    site: Site, tags: Tags | None, streams: Streams, nodes: Sequence[int], untie: bool
) -> Site:
    if not nodes:
        return site
    if tags is not None:
        return replace(site, centering="folded")
    return replace(site, centering="kept", centering_reason=_reason(streams, nodes, untie))


def _reason(streams: Streams, nodes: Sequence[int], untie: bool) -> str:
    for index in nodes:
        if index in streams.kept:
            return streams.kept[index]
        for tag in _ordered(streams.read.get(index, frozenset())):
            if reason := _refusal(streams, tag, untie):
                return reason
    source = same_as(streams.graph, streams.flow.norm_calls[nodes[0]].source)
    if source in streams.broken:
        return streams.broken[source]
    made = streams.graph.producer(source)
    return NOT_LINEAR.format(made.where if made else "it is an input of the model")


def _with_entries(
    flow: Flow, layers: Sequence[Sequence[int]], untie: bool
) -> tuple[Streams, list[Entry]]:
    """Follow the streams, and begin some with an operation of their own where that pays."""
    streams = find_streams(flow)
    entries: list[Entry] = []
    best = _count(streams, layers, untie)
    for entry in _candidates(streams, layers):
        trial = find_streams(flow, _values(flow.graph, [*entries, entry]))
        count = _count(trial, layers, untie)
        if count >= best + _SAVES:
            streams, best = trial, count
            entries.append(entry)
    return streams, entries


def _count(streams: Streams, layers: Sequence[Sequence[int]], untie: bool) -> int:
    return sum(_tags(streams, nodes, untie) is not None for nodes in layers)


def _candidates(streams: Streams, layers: Sequence[Sequence[int]]) -> list[Entry]:
    """Modules that give out, or take in, what a LayerNorm reads and no linear layer writes."""
    found: dict[Entry, None] = {}
    for nodes in layers:
        for index in nodes:
            if index not in streams.read and len(found) < _MOST_TRIES:
                found |= dict.fromkeys(_entries(streams.flow, index))
    return list(found)


def _entries(flow: Flow, index: int) -> Iterator[Entry]:
    graph, source = flow.graph, same_as(flow.graph, flow.norm_calls[index].source)
    for call in graph.calls.values():
        alike = [other for other in graph.calls.values() if other.path == call.path]
        if source in call.returned[:1] and _only(graph, alike, "returned", within=False):
            yield Entry(call.path)
            return
        if source in call.received[:1] and _only(graph, alike, "received", within=True):
            yield Entry(call.path, received=True)
            return


def _only(graph: Graph, calls: Sequence[Call], what: str, *, within: bool) -> bool:
    """Whether what each call of a module returned is read only outside of it, or what it received
    only inside: a hook changes it for the others alone, or for the module alone."""
    values = [getattr(call, what)[:1] for call in calls]
    return all(values) and all(
        inside == within
        for call, (value,) in zip(calls, values, strict=True)
        for inside in _read_within(graph, same_as(graph, value), call.path)
    )


def _read_within(graph: Graph, source: int, path: str) -> list[bool]:
    """For every reading of a value whether it is within the module at `path`."""
    readers = [node for node in graph.nodes if source in {same_as(graph, v) for v in node.inputs}]
    return [node.path == path or node.path.startswith(f"{path}.") for node in readers]


def _values(graph: Graph, entries: Sequence[Entry]) -> dict[int, Entry]:
    found: dict[int, Entry] = {}
    for entry in entries:
        for call in graph.calls.values():
            if call.path == entry.path:
                values = call.received if entry.received else call.returned
                found |= dict.fromkeys(values[:1], entry)
    return found
