"""From a model to a plan: a row per norm, with what is done and why the rest is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from flashnorm.compat.torch_names import FakeTensor
from flashnorm.graph.absorb import absorb
from flashnorm.graph.ambient import on_cpu
from flashnorm.graph.centering import centered
from flashnorm.graph.deferral import deferred
from flashnorm.graph.flow import Flow, GainUse
from flashnorm.graph.follow import follow
from flashnorm.graph.gains import NotAffine, convention
from flashnorm.graph.ir import Graph
from flashnorm.graph.modules import is_replaceable
from flashnorm.graph.norm_biases import find_norm_biases, find_slots
from flashnorm.graph.recording import operations, record
from flashnorm.graph.sites import NormCall
from flashnorm.graph.ties import names_of
from flashnorm.graph.unreached import Unreached, refuse_unreached, refuse_unreached_readers
from flashnorm.kernels import norms
from flashnorm.plan import Cancelling, Consumer, Epsilon, Gain, Plan, Site
from flashnorm.settled import with_values

NO_GAIN = "the norm has no gain"
QUANTIZED_WEIGHTS = (
    "{} weights are quantized ({}): nothing is folded into them; accelerate_ defers {} norms into "
    "them"
)
QUANTIZED = "its reader {} is quantized: what was calibrated with this norm keeps it"
FORWARD_CHANGES = (
    "the tied head was not given a gain of its own: this model's forward does something else "
    "when its config says that the head is not tied"
)


def inspect_module(
    model: nn.Module, example_inputs: Any = None, *, untie: bool = False, center: bool = False
) -> Plan:
    """The plan of a live module; it is left as it was found."""
    plan = plan_model(model, example_inputs, untie=untie, center=center)
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
    center: bool = False,
    allow_real: bool = True,
) -> Plan:
    """The plan of a module, whatever the values of its parameters; it is left as it was found."""
    graph = record(model, example_inputs, allow_real)
    plan = make_plan(graph, untie=untie, center=center)
    if not plan.untied:
        return plan
    untied = record(model, example_inputs, allow_real, _declare_untied)
    same = operations(untied) == operations(graph)
    if same and _can_be_untied(getattr(model, "config", None)):
        return plan
    tied = make_plan(graph, center=center)
    return replace(tied, notes=(*tied.notes, FORWARD_CHANGES))


def cancelling(plan: Plan, epsilon: Epsilon = "exact") -> Plan:
    """The plan that also takes the scale out of every norm that other norms undo (E7)."""
    found = [site.path for site in plan.sites if site.scale in ("partial", "cancelled")]
    return replace(plan, cancellings=tuple(Cancelling(path, epsilon) for path in found))


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
    """All calls of one norm, in every recorded pass and every module call."""

    norm_call: NormCall
    path: str
    parameter: str | None
    uses: list[GainUse] = field(default_factory=list)
    norm_calls: list[int] = field(default_factory=list)  # indices of the nodes


@on_cpu()
def make_plan(graph: Graph, *, untie: bool = False, center: bool = False) -> Plan:
    """Analyse a recorded graph. Nothing is touched; refusing is a row of the plan.

    With `untie` tied weights may get a copy of their own; with `center` LayerNorms are freed of
    their mean where the writers of what they read can be centered (E3).
    """
    plan, flow, rows = _make_plan(graph, untie)
    norm_calls = [row.norm_calls for row in rows]
    plan = centered(plan, flow, norm_calls, untie) if center else plan
    plan = deferred(plan, flow, norm_calls)
    if not graph.packed:
        return plan
    sites = tuple(_with_quantized(site, graph) for site in plan.sites)
    return replace(plan, sites=sites, notes=(*plan.notes, *_notes_on_quantized(graph, sites)))


def _notes_on_quantized(graph: Graph, sites: tuple[Site, ...]) -> Iterator[str]:
    """Who packed how many weights, and how many norms accelerate_ defers into them."""
    by_origin: dict[str, list[str]] = defaultdict(list)
    for name, origin in graph.packed.items():
        by_origin[origin].append(name)
    for origin, names in by_origin.items():
        read = sum(any(names_of(graph, n)[0] in names for n in site.quantized) for site in sites)
        yield QUANTIZED_WEIGHTS.format(len(names), origin, read)


def _with_quantized(site: Site, graph: Graph) -> Site:
    """With the readers that hold packed weights, whose norms keep their scale: it is deferred."""
    found = [reader.parameter for reader in site.readers]
    quantized = [name for name in found if names_of(graph, name)[0] in graph.packed]
    site = replace(site, quantized=tuple(dict.fromkeys((*site.quantized, *quantized))))
    if not site.quantized or site.scale not in ("partial", "cancelled"):
        return site
    reason = QUANTIZED.format(site.quantized[0])
    return replace(site, scale="kept", scale_reason=reason, readers=(), renorms=())


def _make_plan(graph: Graph, untie: bool) -> tuple[Plan, Flow, list[_Row]]:
    flow = follow(graph)
    unreached = Unreached.of(flow)
    refuse_unreached(flow, unreached)
    conventions = _conventions(flow)
    _refuse_other_readings(flow)
    norm_biases = find_norm_biases(flow)
    consumers, untied = absorb(flow, untie)
    refuse_unreached_readers(flow, unreached, untie)
    rows = _rows(flow)
    sites = tuple(_site(flow, row, conventions, consumers, norm_biases) for row in rows)
    notes = (*graph.notes, *_final_note(sites))
    return Plan(sites, untied=untied, unreached=unreached.parameters, notes=notes), flow, rows


def _final_note(sites: tuple[Site, ...]) -> tuple[str, ...]:
    """The output of the last norm is an interface: callers may ask for it by name."""
    if not sites or sites[-1].gain_state != "folded":
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
    """Calls put together by module and gain, or by module and order within it without one."""
    by_node: dict[int, list[GainUse]] = defaultdict(list)
    for use in flow.gains:
        by_node[id(use.norm_call)].append(use)
    rows: dict[tuple[str, str | int], _Row] = {}
    order: dict[tuple[str, int], int] = defaultdict(int)
    for index, norm_call in flow.norm_calls.items():
        path, call = norm_call.node.path, norm_call.node.call
        for use in by_node[id(norm_call)]:
            row = rows.setdefault((path, use.parameter), _Row(norm_call, path, use.parameter))
            row.uses.append(use)
            row.norm_calls.append(index)
        odd = id(norm_call) in flow.odd
        if not by_node[id(norm_call)] and (odd or not _is_mere_function(norm_call)):
            row = rows.setdefault((path, order[path, call]), _Row(norm_call, path, None))
            row.norm_calls.append(index)
        order[path, call] += 1
    return list(rows.values())


def _is_mere_function(norm_call: NormCall) -> bool:
    """Without a gain, f(α·x) is only taken for a norm where f is the one it was published with, and
    a value divided by a statistic where that is a norm's: others are shares and weights."""
    learned = norms.described(norm_call.kind).learns_alpha
    return norm_call.kind == norms.OTHER or (learned and norm_call.node.op != "tanh")


def _site(
    flow: Flow,
    row: _Row,
    conventions: dict[str, Gain],
    consumers: dict[str, list[Consumer]],
    norm_biases: dict[str, str],
) -> Site:
    norm_call = row.norm_call
    common = (row.path, norm_call.kind, norm_call.width, norm_call.eps)
    gain = conventions.get(row.parameter or "")
    # What takes the place of a module reads the gain in the convention that the plan tells.
    known = row.parameter is None or gain is not None
    replaceable = known and _replaceable(flow, row)
    facts: dict[str, Any] = {"source": norm_call.node.source, "replaceable": replaceable}
    if row.parameter is None:
        odd = flow.odd.get(id(norm_call), "")
        return Site(*common, "kept" if odd else "none", odd or NO_GAIN, **facts)
    found = consumers.get(row.parameter, ())
    packed = flow.graph.packed
    names = [c.parameter for c in found if names_of(flow.graph, c.parameter)[0] in packed]
    facts["quantized"] = tuple(names)
    reason = flow.refused.get(row.parameter, "" if found else "nothing that was recorded reads it")
    norm_bias = norm_biases.get(row.parameter, "")
    if reason:
        facts |= _kept_bias(flow, row.parameter)
        return Site(*common, "kept", reason, gain=gain, **facts)
    site = Site(*common, "folded", "", tuple(found), gain, **facts)
    return _with_bias(flow, site, row.parameter, norm_bias) if norm_bias else site


def _replaceable(flow: Flow, row: _Row) -> bool:
    return all(is_replaceable(flow, flow.norm_calls[index]) for index in row.norm_calls)


def _kept_bias(flow: Flow, gain: str) -> dict[str, Any]:
    uses = flow.norm_biases.get(gain)
    if not uses:
        return {}
    return {"bias": "kept", "bias_reason": "its gain is kept", "norm_bias": uses[0].parameter}


def _with_bias(flow: Flow, site: Site, gain: str, norm_bias: str) -> Site:
    """The bias goes into the readers' own biases (E2), or stays with the norm as β/g (E13)."""
    slots, reason = find_slots(flow, gain, site.consumers)
    if reason:
        return replace(site, bias="carried", bias_reason=reason, norm_bias=norm_bias)
    into = tuple(replace(c, bias=slots[c.parameter]) for c in site.consumers)
    return replace(site, bias="folded", norm_bias=norm_bias, consumers=into)
