"""Fold one tiny model and hold it against its original, both in true float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map_only

import flashnorm
from flashnorm.plan import Plan
from flashnorm.verification.precision import float64_truth
from tests.forcing import force_

from .build import tiny_inputs, tiny_model


@dataclass(frozen=True)
class Outcome:
    """What a fold did: its plan, its error, and the error that rounding alone explains.

    `error` is max |Δlogit| / max |logit|. `noise` is the same after every weight was changed by one
    part in 2⁵²: a discontinuous model (a router's top-k, a mask) moves by more than rounding.
    """

    plan: Plan
    error: float
    noise: float


def fold_outcome(name: str, *, with_inputs: bool, seed: int = 0) -> Outcome:
    """Fold the tiny model `name` in float64, planned on its own inputs or on the default ones."""
    model = tiny_model(name, seed).double()
    inputs = _doubled(tiny_inputs(model))
    before = _logits(model, inputs)
    noise = _relative(_logits(_nudged(model), inputs), before)
    plan = flashnorm.fold_(model, copy.deepcopy(inputs) if with_inputs else None)
    return Outcome(plan, _relative(_logits(model, inputs), before), noise)


def _doubled(inputs: dict) -> dict:
    def double(tensor):
        return tensor.double() if tensor.is_floating_point() else tensor

    return tree_map_only(torch.Tensor, double, inputs)


def _logits(model, inputs):
    # Copies, because some models keep state from one call to the next.
    model, inputs = copy.deepcopy(model), copy.deepcopy(inputs)
    with torch.no_grad(), float64_truth():
        return model(**inputs).logits


def _nudged(model):
    nudged = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in nudged.parameters():
            step = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.mul_(1 + step.double() * torch.finfo(torch.float64).eps)
    return nudged


def _relative(found, expected) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def needed_refusals(name: str, seed: int = 0) -> dict[str, bool]:
    """For every refused gain whether folding it all the same changes the logits.

    Each is folded into whatever contracts with it, alone, on a model of its own.
    """
    model = tiny_model(name, seed).double()
    inputs = _doubled(tiny_inputs(model))
    before = _logits(model, inputs)
    plan = flashnorm.inspect(model, copy.deepcopy(inputs))
    kept = dict.fromkeys(s.weight.parameter for s in plan.sites if s.gain == "kept" and s.weight)
    needed = {}
    for gain in kept:
        forced = copy.deepcopy(model)
        force_(forced, copy.deepcopy(inputs), [gain])
        needed[gain] = not _relative(_logits(forced, inputs), before) < 1e-9
    return needed
