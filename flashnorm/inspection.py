"""`inspect`: the plan of anything that names a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashnorm.errors import TraceError
from flashnorm.plan import BiasState, Gain, GainState, Plan, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flashnorm.graph.nouns import Graph

FORWARD_CHANGES = (
    "the tied head was not given a weight of its own: this model's forward does something else "
    "when its config says that the head is not tied"
)
QUANTIZED = (
    "its readers are quantized ({}): a gain per input channel does not fit their scales; fold "
    "before quantizing. Deferral, which needs no fold, still applies"
)
NOT_CARRIED = (
    "its bias {} cannot be kept as β/g, because the gain is zero, or next to it, where the bias is "
    "not (E13)"
)
ALREADY_ONE = "its gain is one everywhere already: nothing to fold"


def inspect(
    model: Any, example_inputs: Any = None, *, untie: bool = False, centre: bool = False
) -> Plan:
    """The plan of a model: every norm, whether its gain folds, into what, and if not why.

    `model` is a live `torch.nn.Module`, a local directory, a bare config.json, a GGUF file or a hub
    id. Of a path only the config is read, and the gains themselves where the weights are at hand:
    parameters stay fake, so a model of any size takes seconds. `example_inputs`, a dict or tuple
    for the model's forward, or a list of several of them, is needed for modules that are not from
    transformers; all are recorded, and what any of them reads counts. `untie` plans a
    copy of a tied head's weight, so that the final gain folds as well; `centre` plans to centre
    what LayerNorms read, so that they need no mean (E3).

    Raises TraceError where the model cannot be recorded, CheckpointError where a path holds no
    model that can be read. Source: FlashNorm, arXiv 2407.09577.
    """
    from torch import nn

    if isinstance(model, nn.Module):
        return inspect_module(model, example_inputs, untie=untie, centre=centre)
    from flashnorm.graph.ambient import on_cpu

    with on_cpu():
        return _inspect_origin(model, example_inputs, untie, centre)


def _inspect_origin(model: Any, example_inputs: Any, untie: bool, centre: bool) -> Plan:
    """The plan of a model that is not in memory."""
    from flashnorm.origin import open_origin

    origin = open_origin(model)
    plan = _plan(origin.fake_model(), example_inputs, untie, centre, allow_real=False)
    plan = replace(plan, notes=(*origin.notes, *plan.notes))
    if origin.quantized:
        return _without_folds(plan, QUANTIZED.format(origin.quantized))
    return with_values(plan, origin.gain)


def inspect_module(
    model: nn.Module, example_inputs: Any = None, *, untie: bool = False, centre: bool = False
) -> Plan:
    """The plan of a live module; it is left as it was found."""
    plan = _plan(model, example_inputs, untie, centre, allow_real=True)
    return with_values(plan, _live_values(model))


def _plan(
    model: nn.Module, example_inputs: Any, untie: bool, centre: bool, allow_real: bool
) -> Plan:
    from flashnorm.planner import make_plan

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


def record(
    model: nn.Module,
    example_inputs: Any = None,
    allow_real: bool = True,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Graph:
    """The graph of a model, on all of the given inputs or on ones made from its signature.

    `prepare` may change the stand-in that is recorded. The model itself is only read.
    """
    from flashnorm.graph import inputs
    from flashnorm.graph.trace import trace
    from flashnorm.graph.unite import united

    def decode(stand_in: nn.Module, given: Any, output: Any) -> Any:
        return inputs.decode_inputs(given, output, stand_in)

    def traced(candidates: Iterable[Any]) -> Graph:
        return trace(model, candidates, decode, allow_real=allow_real, prepare=prepare)

    if example_inputs is None:
        return traced(inputs.example_inputs(model))
    return united([traced([given]) for given in input_sets(example_inputs)])


def input_sets(given: Any) -> list[Any]:
    """A list holds several sets of inputs; a tensor by itself is a forward's one argument."""
    sets = given if isinstance(given, list) else [given]
    if not sets:
        raise TraceError("example_inputs is an empty list: give at least one set of inputs")
    return [one if isinstance(one, (Mapping, tuple)) else (one,) for one in sets]


def operations(graph: Graph) -> list[tuple[str, str, str]]:
    """What a forward does, in order: to tell whether a setting changes it."""
    return [(node.op, node.path, node.source) for node in graph.nodes]


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


def _without_folds(plan: Plan, reason: str) -> Plan:
    sites = tuple(_unfolded(s, "kept", reason) if s.gain == "folded" else s for s in plan.sites)
    sites = tuple(_uncentred(s, reason) for s in sites)
    return replace(plan, sites=sites, untied=(), centrings=(), entries=())


def _uncentred(site: Site, reason: str) -> Site:
    if site.centring != "folded":
        return site
    return replace(site, centring="kept", centring_reason=reason)


def _unfolded(site: Site, state: GainState, reason: str) -> Site:
    bias: dict[str, Any] = (
        {"bias": "kept", "bias_reason": "its gain is not folded"} if site.shift else {}
    )
    return replace(site, gain=state, reason=reason, consumers=(), **bias)


def with_values(plan: Plan, value_of: Callable[[str], Tensor | None]) -> Plan:
    """The plan that the values allow: nothing to fold where a gain is one everywhere already, and
    no gain folded that is zero where the bias it would carry is not (E13).

    `value_of` gives the value of a parameter where it is at hand.
    """
    settled: dict[tuple[Gain, str, BiasState], Callable[[Site], Site]] = {}

    def settle(site: Site) -> Site:
        assert site.weight is not None
        key = (site.weight, site.shift, site.bias)
        if key not in settled:
            settled[key] = _settlement(*key, value_of)
        return settled[key](site)

    sites = tuple(settle(s) if s.gain == "folded" else s for s in plan.sites)
    changed = {c.parameter for s in sites for c in s.consumers}
    changed |= {centring.parameter for centring in plan.centrings}
    untied = tuple(pair for pair in plan.untied if changed & {*pair})
    return replace(plan, sites=sites, untied=untied)


def _settlement(
    gain: Gain, shift: str, bias: BiasState, value_of: Callable[[str], Tensor | None]
) -> Callable[[Site], Site]:
    """What the values of one gain and its bias do to the sites that have them."""
    from flashnorm.algebra import can_carry, effective_gain, is_identity

    value = value_of(gain.parameter)
    beta = value_of(shift) if shift else None
    if value is None or (shift and beta is None):
        return lambda site: site
    moves_bias = bias == "folded" and beta is not None and bool((beta != 0).any())
    if is_identity(value, gain) and not moves_bias:
        return lambda site: _unfolded(site, "none", ALREADY_ONE)
    if bias == "carried" and beta is not None and not can_carry(beta, effective_gain(value, gain)):
        return lambda site: _unfolded(site, "kept", NOT_CARRIED.format(shift))
    return lambda site: site


def _live_values(model: nn.Module) -> Callable[[str], Tensor | None]:
    from flashnorm.compat.torch_names import FakeTensor

    parameters = dict(model.named_parameters())

    def value_of(name: str) -> Tensor | None:
        value = parameters[name]
        return None if value.is_meta or isinstance(value, FakeTensor) else value

    return value_of
