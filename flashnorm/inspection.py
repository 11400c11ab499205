"""`inspect`: the plan of anything that names a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashnorm.plan import Gain, Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

ALREADY_ONE = "its gain is one everywhere already: nothing to fold"


def inspect_module(model: nn.Module, example_inputs: Any = None, *, untie: bool = False) -> Plan:
    """The plan of a live module; it is left as it was found."""
    from flashnorm.graph.inputs import decode_inputs, example_inputs as defaults
    from flashnorm.graph.trace import trace
    from flashnorm.planner import make_plan

    if example_inputs is not None:
        graph = trace(model, [example_inputs])
    else:
        graph = trace(model, defaults(model), lambda i, o: decode_inputs(i, o, model))
    return without_identities(make_plan(graph, untie=untie), _live_values(model))


def without_identities(plan: Plan, value_of: Callable[[str], Tensor | None]) -> Plan:
    """The plan with gains that are one everywhere already taken out: there is nothing to fold.

    `value_of` gives the value of a parameter where it is at hand.
    """
    from flashnorm.algebra import is_identity

    known: dict[Gain, bool] = {}
    for gain in plan.gains():
        value = value_of(gain.parameter)
        known[gain] = value is not None and is_identity(value, gain)
    sites = tuple(
        replace(s, gain="none", reason=ALREADY_ONE, consumers=())
        if s.gain == "folded" and s.weight and known[s.weight]
        else s
        for s in plan.sites
    )
    return replace(plan, sites=sites)


def _live_values(model: nn.Module) -> Callable[[str], Tensor | None]:
    from torch._subclasses.fake_tensor import FakeTensor

    parameters = dict(model.named_parameters())

    def value_of(name: str) -> Tensor | None:
        value = parameters[name]
        return None if value.is_meta or isinstance(value, FakeTensor) else value

    return value_of
