"""From the flow of scales to the plan: where each norm's scale is applied, and what that saves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from flashnorm.graph.flow import Flow
from flashnorm.graph.modules import is_replaceable
from flashnorm.graph.scales import BIASED, ReaderUse, Renormed, Scales, find_scales
from flashnorm.plan import Place, Plan, Reader, Renorm, ScaleState, Site

SCALED = ("rms", "layer")
NOT_A_MODULE = "the norm is not a module of its own"
BIAS = "the norm adds a bias after its scale"
MEAN = "its mean has to be subtracted first; centring (--centre) would take it out"
UNREAD = "nothing that was recorded reads it linearly"


def deferred(plan: Plan, flow: Flow, visits: Sequence[Sequence[int]]) -> Plan:
    """The plan with the place of every norm's scale; `visits` are those of each site.

    A LayerNorm's is deferred with its mean, `s ⊙ (x W*ᵀ − μ u)` (E5), unless it is centred.
    """
    outputs = {
        flow.graph.calls[visit.node.call].returned[0]: index
        for index, visit in flow.visits.items()
        if visit.kind in SCALED and is_replaceable(flow, visit)
    }
    if not outputs:
        return plan
    scales = find_scales(flow, outputs)
    _refuse_shared_renorms(scales, flow)
    undone = _undone(scales)
    sites = tuple(
        _site(scales, site, nodes, undone) if site.kind in SCALED else site
        for site, nodes in zip(plan.sites, visits, strict=True)
    )
    return replace(plan, sites=sites)


def _refuse_shared_renorms(scales: Scales, flow: Flow) -> None:
    """A norm undoes the scale of one other norm whenever it runs; else it reads it scaled."""
    graph, visits = scales.graph, scales.flow.visits
    by_path: dict[str, list[int]] = defaultdict(list)
    for index, visit in visits.items():
        by_path[visit.node.path].append(index)
    owners = {renormed.index: _owners(scales, renormed) for renormed in scales.renormed}
    for renormed in scales.renormed:
        visit = visits[renormed.index]
        indices = by_path[visit.node.path]
        paths = {graph.calls[visits[i].node.call].path for i in indices}
        same = {owners.get(i, frozenset()) for i in indices}
        one_owner = len(same) == 1 and len(next(iter(same))) == 1
        if not (is_replaceable(flow, visit) and one_owner and len(paths) == 1):
            _need_all(scales, renormed)


def _owners(scales: Scales, renormed: Renormed) -> frozenset[str]:
    """The modules of the norms whose scale this one undoes."""
    numbers = [number for number, _ in scales.by_reader(renormed.labels)]
    return frozenset(scales.flow.visits[scales.readers[n].norm].node.path for n in numbers)


def _need_all(scales: Scales, renormed: Renormed) -> None:
    for number, features in scales.by_reader(renormed.labels):
        reader = scales.readers[number]
        reader.needed[features] = True
        reader.reason = reader.reason or "the norm that reads it is not a module of its own"


def _site(
    scales: Scales, site: Site, nodes: Sequence[int], undone_by: Mapping[int, list[Renormed]]
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
    if site.kind == "layer" and site.centring != "folded" and state in ("partial", "cancelled"):
        state, why = "deferred", MEAN
    return replace(site, scale=state, scale_reason=why, readers=readers, renorms=renorms)


def _reason(scales: Scales, site: Site, nodes: Sequence[int]) -> str:
    """Why the scale must stay where it is, if it must."""
    for index in nodes:
        if index in scales.refused:
            return scales.refused[index]
    if not site.replaceable:
        return NOT_A_MODULE
    return BIAS if site.shift and site.bias != "folded" else ""


def _path(scales: Scales, renormed: Renormed) -> str:
    return scales.flow.visits[renormed.index].node.path


def _undone(scales: Scales) -> dict[int, list[Renormed]]:
    """For every norm the norms that undo its scale."""
    found: dict[int, list[Renormed]] = defaultdict(list)
    for renormed in scales.renormed:
        parts = [(scales.readers[n], f) for n, f in scales.by_reader(renormed.labels)]
        for norm in {use.norm for use, f in parts if not bool(use.needed[f].any())}:
            found[norm].append(renormed)
    return found


def _state(
    scales: Scales,
    readers: Sequence[Reader],
    undone: Sequence[Renormed],
    uses: Sequence[ReaderUse],
) -> tuple[ScaleState, str]:
    """(state, why it is not cancelled altogether)."""
    reason = next((use.reason for use in uses if use.reason), "")
    if all(reader.place == "nowhere" for reader in readers):
        return "cancelled", ""
    latent = [r for r in undone if any(use.norm == r.index for use in scales.readers)]
    # A module's output is scaled as a whole, and a bias in it must not be.
    executable = all(reader.path for reader in readers if reader.place != "nowhere") and not any(
        use.reason == BIASED for use in uses
    )
    if latent and executable:
        return "partial", reason
    return "deferred", reason


def _reader(parameter: str, path: str, uses: Sequence[ReaderUse]) -> Reader:
    needed = torch.stack([use.needed for use in uses]).any(0)
    later = torch.stack([use.later for use in uses]).any(0)
    after = next((use.after for use in uses if use.after), "")
    if bool(later.any()) and not bool(needed.any()):
        cost = max(use.after_features for use in uses)
        return Reader(parameter, path, "later", _runs(later), after, cost)
    scaled = needed | later
    place: Place = "output" if bool(scaled.any()) else "nowhere"
    return Reader(parameter, path, place, _runs(scaled), "", int(scaled.sum()))


def _runs(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """(start, length) of every run of marked features."""
    edges = torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).int().diff().nonzero().flatten()
    return tuple((a, b - a) for a, b in list(pairwise(edges.tolist()))[::2])
