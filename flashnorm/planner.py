"""From a model to a plan: a row per norm, with what is done and why the rest is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from flashnorm.compat.torch_names import FakeTensor
from flashnorm.graph.absorb import absorb
from flashnorm.graph.ambient import on_cpu
from flashnorm.graph.centring import centred
from flashnorm.graph.deferral import deferred
from flashnorm.graph.flow import Flow, GainUse
from flashnorm.graph.follow import follow
from flashnorm.graph.gains import NotAffine, convention
from flashnorm.graph.modules import is_replaceable
from flashnorm.graph.nouns import Graph
from flashnorm.graph.recording import operations, record
from flashnorm.graph.shifts import find_shifts, find_slots
from flashnorm.graph.sites import Visit
from flashnorm.graph.unreached import Unreached, refuse_unreached, refuse_unreached_readers
from flashnorm.kernels import norms
from flashnorm.plan import Cancelling, Consumer, Eps, Gain, Plan, Site
from flashnorm.settled import with_values

NO_GAIN = "the norm has no gain"
FORWARD_CHANGES = (
    "the tied head was not given a weight of its own: this model's forward does something else "
    "when its config says that the head is not tied"
)


def inspect_module(
    model: nn.Module, example_inputs: Any = None, *, untie: bool = False, centre: bool = False
) -> Plan:
    """The plan of a live module; it is left as it was found."""
    plan = plan_model(model, example_inputs, untie=untie, centre=centre)
    return with_values(plan, _live_values(model))


def _live_values(model: nn.Module) -> Callable[[str], Tensor | None]:
    parameters = dict(model.named_parameters())

    def value_of(name: str) -> Tensor | None:
        value = parameters[name]
        return None if value.is_meta or isinstance(value, FakeTensor) else value

    return value_of


def plan_model(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    untie: bool = False,
    centre: bool = False,
    allow_real: bool = True,
) -> Plan:
    """The plan of a module, whatever the values of its parameters; it is left as it was found."""
    graph = record(model, example_inputs, allow_real)
    plan = make_plan(graph, untie=untie, centre=centre)
    if not plan.untied:
        return plan
    untied = record(model, example_inputs, allow_real, _declare_untied)
    same = operations(untied) == operations(graph)
    if same and _can_be_untied(getattr(model, "config", None)):
        return plan
    tied = make_plan(graph, centre=centre)
    return replace(tied, notes=(*tied.notes, FORWARD_CHANGES))


def cancelling(plan: Plan, eps: Eps = "exact") -> Plan:
    """The plan that also takes the scale out of every norm that other norms undo (E7)."""
    found = [site.path for site in plan.sites if site.scale in ("partial", "cancelled")]
    return replace(plan, cancellings=tuple(Cancelling(path, eps) for path in found))


def _can_be_untied(config: Any) -> bool:
    """Whether a config that says so comes back from a file as it was, but for that."""
    if not hasattr(config, "to_dict"):
        return True
    untied = {**config.to_dict(), "tie_word_embeddings": False}
    text = untied.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    return bool(type(config).from_dict(untied).to_dict() == untied)


def _declare_untied(model: nn.Module) -> None:
    """Some forwards ask the config whether the head is tied, and scale its input if it is."""
    for module in model.modules():
        if getattr(config := getattr(module, "config", None), "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]


@dataclass
class _Row:
    """All visits of one norm, in every recorded pass and every module call."""

    visit: Visit
    path: str
    parameter: str | None
    uses: list[GainUse] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)  # indices of the nodes


@on_cpu()
def make_plan(graph: Graph, *, untie: bool = False, centre: bool = False) -> Plan:
    """Analyse a recorded graph. Nothing is touched; refusing is a row of the plan.

    With `untie` tied weights may get a copy of their own; with `centre` LayerNorms are freed of
    their mean where the writers of what they read can be centred (E3).
    """
    plan, flow, rows = _make_plan(graph, untie)
    visits = [row.visits for row in rows]
    plan = centred(plan, flow, visits, untie) if centre else plan
    return deferred(plan, flow, visits)


def _make_plan(graph: Graph, untie: bool) -> tuple[Plan, Flow, list[_Row]]:
    flow = follow(graph)
    unreached = Unreached.of(flow)
    refuse_unreached(flow, unreached)
    conventions = _conventions(flow)
    _refuse_other_readings(flow)
    shifts = find_shifts(flow)
    consumers, untied = absorb(flow, untie)
    refuse_unreached_readers(flow, unreached, untie)
    rows = _rows(flow)
    sites = tuple(_site(flow, row, conventions, consumers, shifts) for row in rows)
    notes = (*graph.notes, *_final_note(sites))
    return Plan(sites, untied=untied, unreached=unreached.parameters, notes=notes), flow, rows


def _final_note(sites: tuple[Site, ...]) -> tuple[str, ...]:
    """The output of the last norm is an interface: callers may ask for it by name."""
    if not sites or sites[-1].gain != "folded":
        return ()
    return (
        f"hidden states taken after {sites[-1].path or 'the last norm'} come without its gain, "
        "which is in its readers",
    )


def _conventions(flow: Flow) -> dict[str, Gain]:
    """The convention of every gain; none where it has several."""
    found: dict[str, Gain] = {}
    several: set[str] = set()
    for use in flow.gains:
        try:
            gain = convention(flow, use)
        except NotAffine as error:
            flow.refused.setdefault(use.parameter, str(error))
            continue
        if found.setdefault(use.parameter, gain) != gain:
            flow.refused.setdefault(use.parameter, "it is used as a gain in two conventions")
            several.add(use.parameter)
    return {name: gain for name, gain in found.items() if name not in several}


def _refuse_other_readings(flow: Flow) -> None:
    for name in dict.fromkeys(use.parameter for use in flow.gains):
        for use in flow.uses.get(name, ()):
            flow.refused.setdefault(name, f"the gain is also read by {use.node.where}")


def _rows(flow: Flow) -> list[_Row]:
    """Visits put together by module and gain, or by module and order within it without one."""
    by_node: dict[int, list[GainUse]] = defaultdict(list)
    for use in flow.gains:
        by_node[id(use.visit)].append(use)
    rows: dict[tuple[str, str | int], _Row] = {}
    order: dict[tuple[str, int], int] = defaultdict(int)
    for index, visit in flow.visits.items():
        path, call = visit.node.path, visit.node.call
        for use in by_node[id(visit)]:
            row = rows.setdefault((path, use.parameter), _Row(visit, path, use.parameter))
            row.uses.append(use)
            row.visits.append(index)
        odd = id(visit) in flow.odd
        if not by_node[id(visit)] and (odd or not _is_mere_function(visit)):
            row = rows.setdefault((path, order[path, call]), _Row(visit, path, None))
            row.visits.append(index)
        order[path, call] += 1
    return list(rows.values())


def _is_mere_function(visit: Visit) -> bool:
    """Without a gain, f(α·x) is only taken for a norm where f is the one it was published with, and
    a value divided by a statistic where that is a norm's: others are shares and weights."""
    learned = norms.described(visit.kind).learns_alpha
    return visit.kind == norms.OTHER or (learned and visit.node.op != "tanh")


def _site(
    flow: Flow,
    row: _Row,
    conventions: dict[str, Gain],
    consumers: dict[str, list[Consumer]],
    shifts: dict[str, str],
) -> Site:
    visit = row.visit
    common = (row.path, visit.kind, visit.width, visit.eps)
    weight = conventions.get(row.parameter or "")
    # What takes the place of a module reads the gain in the convention that the plan tells.
    known = row.parameter is None or weight is not None
    replaceable = known and _replaceable(flow, row)
    facts: dict[str, Any] = {"source": visit.node.source, "replaceable": replaceable}
    if row.parameter is None:
        odd = flow.odd.get(id(visit), "")
        return Site(*common, "kept" if odd else "none", odd or NO_GAIN, **facts)
    found = consumers.get(row.parameter, ())
    reason = flow.refused.get(row.parameter, "" if found else "nothing that was recorded reads it")
    shift = shifts.get(row.parameter, "")
    if reason:
        facts |= _kept_bias(flow, row.parameter)
        return Site(*common, "kept", reason, weight=weight, **facts)
    site = Site(*common, "folded", "", tuple(found), weight, **facts)
    return _with_bias(flow, site, row.parameter, shift) if shift else site


def _replaceable(flow: Flow, row: _Row) -> bool:
    return all(is_replaceable(flow, flow.visits[index]) for index in row.visits)


def _kept_bias(flow: Flow, gain: str) -> dict[str, Any]:
    uses = flow.shifts.get(gain)
    if not uses:
        return {}
    return {"bias": "kept", "bias_reason": "its gain is kept", "shift": uses[0].parameter}


def _with_bias(flow: Flow, site: Site, gain: str, shift: str) -> Site:
    """The bias goes into the readers' own biases (E2), or stays with the norm as β/g (E13)."""
    slots, reason = find_slots(flow, gain, site.consumers)
    if reason:
        return replace(site, bias="carried", bias_reason=reason, shift=shift)
    into = tuple(replace(c, bias=slots[c.parameter]) for c in site.consumers)
    return replace(site, bias="folded", shift=shift, consumers=into)
