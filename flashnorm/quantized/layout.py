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
from typing import Any

from torch import Tensor, nn

from flashnorm.kernels.weights import Weight


@dataclass(frozen=True)
class Held:
    """How a module holds W and c; it computes `x Wᵀ + c` of its one argument and nothing else.

    origin: who packed W and how, in words ("torchao, int8, a scale per row"). weight, bias: what
    the module calls the tensor that holds the values, and its bias or nothing. tensors(module): all
    plain tensors that W is read from, as they are now, values first: their addresses tell whether W
    has moved. read(module): W over these tensors, of which values are never copied; KeyError or
    AttributeError where the module no longer holds them.
    """

    origin: str
    weight: str
    bias: str
    tensors: Callable[[nn.Module], Sequence[Tensor]]
    read: Callable[[nn.Module], Weight]


Layout = Callable[[Any], "Held | str | None"]
_layouts: list[Layout] = []


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
