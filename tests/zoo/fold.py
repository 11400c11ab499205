"""Fold one tiny model and hold it against its original, both in true float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map_only

import flashnorm
from flashnorm.plan import Plan
from flashnorm.planner import cancelling
from flashnorm.rewrite import apply_plan_
from flashnorm.verification.precision import float64_truth
from tests.errors import nudged
from tests.forcing import forced_plans

from .build import causal_lm_types, tiny_inputs, tiny_model
from .classes import WHOLE
from .further import further_model, tensors_of
from .variants import VARIANTS


@dataclass(frozen=True)
class Outcome:
    """What a fold did: its plan, its error, and the error that rounding alone explains.

    `error` is the largest max |Δ| / max |·| of all output tensors. `noise` is the same after every
    weight was changed by one part in 2⁵²: a discontinuous model (a router's top-k, a mask) moves by
    more than rounding.
    """

    plan: Plan
    error: float
    noise: float


def specimen(name: str, seed: int = 0) -> tuple[torch.nn.Module, dict]:
    """A tiny model of any type or variant, in float64, and inputs for it."""
    if name in VARIANTS or name in causal_lm_types():
        model = tiny_model(name, seed)
        inputs = tiny_inputs(model)
    else:
        model, inputs = further_model(name.removesuffix(WHOLE), seed)
    return model.double(), _doubled(inputs)


# Everything that fold_ can do beside folding gains and biases.
EVERYTHING = {"untie": True, "center": True, "cancel": True}


def fold_outcome(
    name: str, *, with_inputs: bool, everything: bool = False, seed: int = 0
) -> Outcome:
    """Fold the tiny model `name` in float64, planned on its own inputs or on the default ones."""
    model, inputs = specimen(name, seed)
    before = outputs(model, inputs)
    noise = relative(outputs(nudged(model), inputs), before)
    options = EVERYTHING if everything else {}
    plan = _folded_(model, copy.deepcopy(inputs) if with_inputs else None, options)
    return Outcome(plan, relative(outputs(model, inputs), before), noise)


def _folded_(model, inputs, options) -> Plan:
    """Fold; a forward that runs in float32 only is planned in it."""
    torch.manual_seed(0)
    try:
        return flashnorm.folding(flashnorm.fold_(model, inputs, **options))
    except flashnorm.TraceError:
        narrow = narrowed(inputs)
        to_plan = {key: value for key, value in options.items() if key != "cancel"}
        plan = flashnorm.inspect(copy.deepcopy(model).float(), narrow, **to_plan)
        plan = cancelling(plan) if options.get("cancel") else plan
        apply_plan_(model, plan)
        return plan


def narrowed(inputs: dict) -> dict:
    """The inputs with every floating tensor in float32."""

    def narrow(tensor):
        return tensor.float() if tensor.is_floating_point() else tensor

    return tree_map_only(torch.Tensor, narrow, inputs)


def _doubled(inputs: dict) -> dict:
    def double(tensor):
        return tensor.double() if tensor.is_floating_point() else tensor

    return tree_map_only(torch.Tensor, double, inputs)


def outputs(model, inputs) -> list[torch.Tensor]:
    """All floating tensors that a forward gives, in true float64."""
    # Copies, because some models keep state from one call to the next.
    model, inputs = copy.deepcopy(model), copy.deepcopy(inputs)
    torch.manual_seed(0)
    with torch.no_grad(), float64_truth():
        return tensors_of(model(**inputs))


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative difference of all pairs; infinite where the shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    return max(map(_difference, found, expected), default=0.0)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    finite = expected.isfinite()
    if expected.numel() == 0 or not torch.equal(finite, found.isfinite()):
        return 0.0 if expected.numel() == 0 else float("inf")
    if not finite.any():
        return 0.0
    difference = (found - expected)[finite].abs().max()
    scale = expected[finite].abs().max()
    return (difference / scale if scale else difference).item()


def needed_refusals(name: str, seed: int = 0) -> dict[str, bool]:
    """For every refused gain whether folding it all the same changes the outputs.

    Each is folded into whatever contracts with it, alone, on a model of its own.
    """
    model, inputs = specimen(name, seed)
    before = outputs(model, inputs)
    needed = {}
    for gain, plan in forced_plans(*_recordable(model, inputs)).items():
        forced = copy.deepcopy(model)
        apply_plan_(forced, plan)
        needed[gain] = not relative(outputs(forced, inputs), before) < 1e-9
    return needed


def _recordable(model, inputs):
    """The model and its inputs, in float32 where its forward runs in nothing else."""
    try:
        flashnorm.inspect(model, copy.deepcopy(inputs))
        return model, inputs
    except flashnorm.TraceError:
        return copy.deepcopy(model).float(), narrowed(inputs)
