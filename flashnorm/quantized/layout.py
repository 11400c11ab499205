"""What a linear layer with a packed weight is, and the registry of those who can read one.

    y = x Wᵀ + c,   W = what `kernels.weights.Weight.dequantized` says

A layout is a function that looks at a module and says how it holds W, why it cannot be taken, or
that it knows nothing of it. Each origin (torchao, bitsandbytes, a GGUF file, ..) is one file with
its own layouts, which `register` adds. What a layout says is held against the module's own forward
before anything relies on it (`quantized.proof`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from flashnorm.kernels.weights import Weight


@dataclass(frozen=True)
class Held:
    """How a module holds W and c; it computes `x Wᵀ + c` of its one argument and nothing else.

    origin: who packed W and how, in words ("torchao, int8, a scale per row"). weight, bias: what
    the module calls the tensor that holds the values, and its bias or nothing. tensors(module): all
    plain tensors that W is read from, as they are now, values first: their addresses tell whether W
    has moved. read(module): W over these tensors, of which values are never copied; KeyError,
    AttributeError or Unreadable where the module no longer holds them so.

    dtypes: of x, in which it computes at no less than their own precision; None: in all that it
    takes. rounds: what its own code rounds x, W and y to, where that is narrower than x.
    own(module, x): what it computes by itself, where calling the forward of its class is something
    else. forward(f): whether a forward f on the module itself is the origin's own, which does
    nothing else here. settles: attributes that its own forward sets at its first call, and that
    change nothing of what is said here.
    """

    origin: str
    weight: str
    bias: str
    tensors: Callable[[nn.Module], Sequence[Tensor]]
    read: Callable[[nn.Module], Weight]
    dtypes: tuple[torch.dtype, ...] | None = None
    rounds: torch.dtype | None = None
    own: Callable[[nn.Module, Tensor], Tensor] | None = None
    forward: Callable[[Any], bool] | None = None
    settles: frozenset[str] = frozenset()


class Unreadable(Exception):
    """A module that held a packed weight does no longer hold it so; the text says why."""


Layout = Callable[[Any], "Held | str | None"]


class Unpacking(NamedTuple):
    """A hook `hooks[key]` of a model that unpacks these layers at the first call."""

    hooks: dict[int, Any]
    key: int
    layers: Sequence[nn.Module]


_layouts: list[Layout] = []
_unpacking: list[Callable[[nn.Module], list[Unpacking]]] = []


def register(layout: Layout) -> Layout:
    """Ask this one too, before those that are known."""
    _layouts.insert(0, layout)
    return layout


def find(module: nn.Module) -> Held | str | None:
    """How a module holds a packed weight; why it cannot be taken; None where none is known."""
    for layout in _layouts:
        if (found := layout(module)) is not None:
            return found
    return None


def register_unpacking(
    hooks: Callable[[nn.Module], list[Unpacking]],
) -> Callable[[nn.Module], list[Unpacking]]:
    """Ask this one too which hooks unpack a model's weights at its first call."""
    _unpacking.append(hooks)
    return hooks


def unpacking(model: nn.Module) -> list[Unpacking]:
    """The hooks that would unpack weights at the first call."""
    return [found for hooks in _unpacking for found in hooks(model)]


Aside = tuple[dict[int, Any], int, Any]  # (dict of hooks, key, a hook that was taken out of it)


def put_back(hooks: Sequence[Aside]) -> None:
    """Every hook in front of those that came since, where it is not there."""
    for place, key, hook in hooks:
        others = {k: place.pop(k) for k in list(place) if k != key}
        place[key] = hook
        place.update(others)


_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


def made_of(parts: Sequence[Tensor], make: Callable[[], Tensor], how: object = None) -> Tensor:
    """What is made of tensors that a format does not have as they lie: once, until one changes.

    It is there as long as the first of them is. how: what else it depends on.
    """
    key = how, tuple((id(part), part.data_ptr(), version(part)) for part in parts)
    known = _made.get(parts[0])
    if known is None or known[0] != key:
        _made[parts[0]] = known = (key, make())
    found: Tensor = known[1]
    return found


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor subclass that is nothing but a tensor with attributes."""
    return tensor.detach().as_subclass(Tensor)


def version(tensor: Tensor) -> int:
    """How often a tensor was written into; tensors of inference do not count."""
    return 0 if tensor.is_inference() else tensor._version
