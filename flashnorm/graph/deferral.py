"""From the flow of scales to the plan: where each norm's scale is applied, and what that saves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from flashnorm.graph.flow import Flow
from flashnorm.graph.ir import Graph
from flashnorm.graph.modules import is_replaceable
from flashnorm.graph.scales import BIASED, ReaderUse, Renormed, Scales, find_scales
from flashnorm.graph.unreached import Unreached
from flashnorm.kernels import norms
from flashnorm.plan import Place, Plan, Renorm, ScaledReader, ScaleState, Site

NOT_A_MODULE = "the norm is not a module of its own"
NOT_OURS = "its module has more than a weight and a bias, so that none of ours can replace it"
BIAS = "the norm adds a bias after its scale"
MEAN = "its mean has to be subtracted first; centering (--center) would take it out"
# What a matrix, and what a vector, that was not reached may do.
_DOUBTS = ("read what has no scale", "be added to what has no scale")
UNREAD = "nothing that was recorded reads it linearly"


def deferred(plan: Plan, flow: Flow, norm_calls: Sequence[Sequence[int]]) -> Plan:
    """The plan with the place of every norm's scale; `norm_calls` are those of each site.

    A LayerNorm's is deferred with its mean, `s ⊙ (x W*ᵀ − μ u)` (E5), unless it is centered.
    """
    outputs = {
        flow.graph.calls[norm_call.node.call].returned[0]: index
        for index, norm_call in flow.norm_calls.items()
        if norms.described(norm_call.kind).scales and is_replaceable(flow, norm_call)
    }
    if not outputs:
        return plan
    scales = find_scales(flow, outputs)
    linked = {site.path for site in plan.sites if _can_be_linked(flow.graph, site)}
    _refuse_shared_renorms(scales, linked)
    _refuse_unreached(scales, flow)
    undone = _undone(scales)
    sites = tuple(
        _site(scales, site, nodes, undone, linked) if norms.described(site.kind).scales else site
        for site, nodes in zip(plan.sites, norm_calls, strict=True)
    )
    return replace(plan, sites=sites)


def _can_be_linked(graph: Graph, site: Site) -> bool:
    """Whether a norm of ours, which has a `weight` and a `bias`, can take the module's place."""
    if not site.replaceable or site.eps is None or (site.gain and site.gain.scale != 1.0):
        return False
    used = [site.gain.parameter if site.gain else "", site.norm_bias]
    own = f"{site.path}." if site.path else ""
    names = [
        own + leaf if name else "" for name, leaf in zip(used, ("weight", "bias"), strict=True)
    ]
    held = [
        n for alike in graph.aliases.values() for n in alike if n.rpartition(".")[0] == site.path
    ]
    return names == used and {*held} <= {*used}


def _refuse_shared_renorms(scales: Scales, linked: set[str]) -> None:
    """A norm undoes the scale of one other norm whenever it runs; else it reads it scaled."""
    graph, norm_calls = scales.graph, scales.flow.norm_calls
    by_path: dict[str, list[int]] = defaultdict(list)
    for index, norm_call in norm_calls.items():
        by_path[norm_call.node.path].append(index)
    owners = {renormed.index: _owners(scales, renormed) for renormed in scales.renormed}
    for renormed in scales.renormed:
        norm_call = norm_calls[renormed.index]
        indices = by_path[norm_call.node.path]
        paths = {graph.calls[norm_calls[i].node.call].path for i in indices}
        same = {owners.get(i, frozenset()) for i in indices}
        one_owner = len(same) == 1 and len(next(iter(same))) == 1
        if not (norm_call.node.path in linked and one_owner and len(paths) == 1):
            _need_all(scales, renormed)


def _owners(scales: Scales, renormed: Renormed) -> frozenset[str]:
    """The modules of the norms whose scale this one undoes."""
    numbers = [number for number, _ in scales.by_reader(renormed.indices)]
    return frozenset(scales.flow.norm_calls[scales.readers[n].norm].node.path for n in numbers)


def _need_all(scales: Scales, renormed: Renormed) -> None:
    for number, features in scales.by_reader(renormed.indices):
        reader = scales.readers[number]
        reader.needed[features] = True
        reader.reason = reader.reason or "the norm that reads it is not a module of its own"


def _refuse_unreached(scales: Scales, flow: Flow) -> None:
    """Other inputs may read a value without its scale, or use one of the norms elsewhere."""
    if not scales.renormed:
        return
    unreached, paths = Unreached.of(flow), _extents(scales)
    for use in scales.readers:
        own = flow.norm_calls[use.norm]
        norms = {_path(scales, r) for r in scales.renormed if _reads(scales, r, use)}
        reasons = [
            unreached.doubt(own.width, paths[use.norm], *_DOUBTS),
            *map(unreached.module_elsewhere, (own.node.path, use.path, *sorted(norms))),
        ]
        if reason := next(filter(None, reasons), ""):
            use.needed[:] = True
            use.reason = reason


def _reads(scales: Scales, renormed: Renormed, use: ReaderUse) -> bool:
    return any(scales.readers[n] is use for n, _ in scales.by_reader(renormed.indices))


def _extents(scales: Scales) -> dict[int, set[str]]:
    """For every norm the modules that its output, and what is scaled by it, pass by."""
    found: dict[int, set[str]] = defaultdict(set)
    for node in scales.graph.nodes:
        for value in node.inputs:
            if value in scales.direct:
                found[scales.direct[value]].add(node.path)
            elif value in scales.flow.indices:
                for number, _ in scales.by_reader(scales.involved(value)):
                    found[scales.readers[number].norm].add(node.path)
    return found


def _site(
    scales: Scales,
    site: Site,
    nodes: Sequence[int],
    undone_by: Mapping[int, list[Renormed]],
    linked: set[str],
) -> Site:
    reason = _reason(scales, site, nodes)
    uses = [use for use in scales.readers if use.norm in nodes]
    if reason or not uses:
        return replace(site, scale_reason=reason or UNREAD)
    # One for every width: a weight may be read in parts.
    groups: dict[tuple[str, str, int], list[ReaderUse]] = defaultdict(list)
    for use in uses:
        groups[use.parameter, use.path, use.features].append(use)
    readers = tuple(_reader(name, path, group) for (name, path, _), group in groups.items())
    undone = [renormed for index in nodes for renormed in undone_by.get(index, ())]
    renorms = tuple(
        Renorm(path, max((r.rows for r in undone if _path(scales, r) == path), key=len))
        for path in dict.fromkeys(_path(scales, r) for r in undone)
    )
    state, why = _state(scales, readers, undone, uses)
    centers = norms.described(site.kind).centers and site.centering != "folded"
    if centers and state in ("partial", "cancelled"):
        state, why = "deferred", MEAN
    if site.path not in linked and state in ("partial", "cancelled"):
        state, why = "deferred", NOT_OURS
    return replace(site, scale=state, scale_reason=why, readers=readers, renorms=renorms)


def _reason(scales: Scales, site: Site, nodes: Sequence[int]) -> str:
    """Why the scale must stay where it is, if it must."""
    for index in nodes:
        if index in scales.refused:
            return scales.refused[index]
    if not site.replaceable:
        return NOT_A_MODULE
    return BIAS if site.norm_bias and site.bias != "folded" else ""


def _path(scales: Scales, renormed: Renormed) -> str:
    return scales.flow.norm_calls[renormed.index].node.path


def _undone(scales: Scales) -> dict[int, list[Renormed]]:
    """For every norm the norms that undo its scale."""
    found: dict[int, list[Renormed]] = defaultdict(list)
    for renormed in scales.renormed:
        parts = [(scales.readers[n], f) for n, f in scales.by_reader(renormed.indices)]
        for norm in {use.norm for use, f in parts if not bool(use.needed[f].any())}:
            found[norm].append(renormed)
    return found


def _state(
    scales: Scales,
    readers: Sequence[ScaledReader],
    undone: Sequence[Renormed],
    uses: Sequence[ReaderUse],
) -> tuple[ScaleState, str]:
    """(state, why it is not cancelled altogether)."""
    reason = next((use.reason for use in uses if use.reason), "")
    if all(reader.place == "nowhere" for reader in readers):
        return "cancelled", ""
    latent = [r for r in undone if any(use.norm == r.index for use in scales.readers)]
    # A module's output is scaled as a whole, at every call, and a bias in it must not be.
    scaled = [reader.path for reader in readers if reader.place != "nowhere"]
    own = {use.call for use in uses}
    called = {n for n, call in scales.graph.calls.items() if call.path in scaled}
    executable = all(scaled) and called <= own and not any(use.reason == BIASED for use in uses)
    if latent and executable:
        return "partial", reason
    return "deferred", reason


def _reader(parameter: str, path: str, uses: Sequence[ReaderUse]) -> ScaledReader:
    needed = torch.stack([use.needed for use in uses]).any(0)
    later = torch.stack([use.later for use in uses]).any(0)
    after = next((use.after for use in uses if use.after), "")
    if bool(later.any()) and not bool(needed.any()):
        cost = max(use.after_features for use in uses)
        return ScaledReader(parameter, path, "later", _runs(later), after, cost)
    scaled = needed | later
    place: Place = "output" if bool(scaled.any()) else "nowhere"
    return ScaledReader(parameter, path, place, _runs(scaled), "", int(scaled.sum()))


def _runs(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """(start, length) of every run of marked features."""
    edges = torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).int().diff().nonzero().flatten()
    return tuple((a, b - a) for a, b in list(pairwise(edges.tolist()))[::2])
