"""Linear layers of torch whose weight is a tensor subclass that holds packed numbers.

    F.linear(x, weight, bias) = x Wᵀ + c

An origin says what one of its tensors holds, and `register` makes every linear layer with such a
weight known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.kernels.weights import Weight
from flashnorm.quantized import layout
from flashnorm.quantized.layout import Held

WEIGHT = "weight"


@dataclass(frozen=True)
class Inside:
    """What a tensor subclass [k, n] holds: `Held` in terms of the tensor. Functions of a module's
    file, so that they can be pickled."""

    origin: str
    tensors: Callable[[Any], Sequence[Tensor]]
    read: Callable[[Any], Weight]
    dtypes: tuple[torch.dtype, ...] | None = None


Inner = Callable[[Any], "Inside | str | None"]
_known: list[Inner] = []


def register(inner: Inner) -> Inner:
    """Ask this one too what a tensor subclass holds, before those that are known."""
    _known.insert(0, inner)
    return inner


def inside(weight: Tensor) -> Inside | str | None:
    """What a tensor subclass holds; why it cannot be read; None where it is none that is known."""
    for inner in _known:
        if (found := inner(weight)) is not None:
            return found
    return None


@layout.register
def _linear(module: Any) -> Held | str | None:
    weight = module._parameters.get(WEIGHT)
    if weight is None or type(weight) in (Tensor, nn.Parameter) or weight.dim() != 2:
        return None
    found = inside(weight)
    if found is None or isinstance(found, str):
        return found
    if type(module).forward is not nn.Linear.forward:
        return None
    bias = "" if module._parameters.get("bias") is None else "bias"
    return Held(
        found.origin,
        WEIGHT,
        bias,
        partial(_tensors, found.tensors),
        partial(_read, found.read),
        found.dtypes,
    )


def _tensors(tensors: Callable[[Any], Sequence[Tensor]], module: nn.Module) -> Sequence[Tensor]:
    return tensors(module._parameters[WEIGHT])


def _read(read: Callable[[Any], Weight], module: nn.Module) -> Weight:
    return read(module._parameters[WEIGHT])
