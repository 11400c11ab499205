"""Accelerate one tiny model and hold it against its original, both in float32."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.runtime import Acceleration
from flashnorm.verification.bounds import Size, output_bound, owns_matrix, width_of
from tests.errors import nudged

from .fold import narrowed, relative, specimen
from .further import tensors_of


@dataclass(frozen=True)
class Outcome:
    """What acceleration did. `error` and `noise` as in `fold.Outcome`, but in float32; `bound` is
    what other roundings explain; `restored` whether the original came back bit for bit."""

    acceleration: Acceleration
    error: float
    noise: float
    bound: float
    restored: bool
    fallbacks: dict[str, int]


def accelerate_outcome(name: str, seed: int = 0) -> Outcome:
    model, inputs = specimen(name, seed)
    model, inputs = model.float(), narrowed(inputs)
    before = outputs(model, inputs)
    noise = relative(outputs(nudged(model), inputs), before)
    torch.manual_seed(0)
    flashnorm.accelerate_(model, copy.deepcopy(inputs))
    acceleration = flashnorm.acceleration(model)
    warm(model, inputs)
    calls = dispatch.fallbacks()
    error = relative(outputs(model, inputs), before)
    fallen = {why: n - calls.get(why, 0) for why, n in dispatch.fallbacks().items()}
    flashnorm.restore_(model)
    restored = all(map(torch.equal, outputs(model, inputs), before))
    depth = sum(owns_matrix(module) for module in model.modules())
    bound = output_bound(Size(width_of(model), depth, torch.float32), torch.float32)
    fallen = {why: count for why, count in fallen.items() if count}
    return Outcome(acceleration, error, noise, bound, restored, fallen)


def warm(model, inputs) -> None:
    """Every module runs its own forward once before a kernel takes its place."""
    _run(model, inputs)


def outputs(model, inputs) -> list[torch.Tensor]:
    """All floating tensors that a forward gives."""
    return [tensor.double() for tensor in _run(copy.deepcopy(model), inputs)]


def _run(model, inputs) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_of(model(**copy.deepcopy(inputs)))
