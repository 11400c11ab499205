"""Packed layers while a model is measured: dequantized for the truth, their own code elsewhere.

    float64: y = x Wᵀ + c, with W dequantized; any other dtype: what the layer itself computes

Own code runs on another object over the same memory, because some layers pack their weights anew at
their first call. What does not run in a dtype computes `x Wᵀ + c` in it, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.graph.packed import named, twin_of
from flashnorm.kernels.weights import dense
from flashnorm.quantized import layout
from flashnorm.quantized.layout import Aside, Held, put_back
from flashnorm.runtime.forwards import Fused

Layers = dict[str, tuple[nn.Module, Held]]


def parts(layers: Layers) -> set[int]:
    """The ids of the tensors that packed weights are made of, which have no other dtype."""
    found: set[int] = set()
    for module, held in layers.values():
        names = {*module._parameters, *module._buffers} - {held.bias}
        found |= {id(named(module, name)) for name in names}
    return found


@contextmanager
def computing(
    model: nn.Module, layers: Layers, dtype: torch.dtype, notes: list[str] | None
) -> Iterator[None]:
    """Let packed layers compute x of a dtype, as above; their forwards are put back afterwards."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    lost: list[str] = []
    hooks = _unhooked(model, layers)
    try:
        for path, (module, held) in layers.items():
            space = vars(module)
            if _is_taken(space.get("forward"), dtype):
                continue
            own = None if dtype == torch.float64 else _own(module, held, dtype)
            if own is None and dtype != torch.float64:
                lost.append(path)
            before.append((space, {k: space[k] for k in ("forward",) if k in space}))
            space["forward"] = _dequantized(module, held) if own is None else own
        if lost and notes is not None:
            notes.append(LOST.format(len(lost), lost[0], str(dtype).removeprefix("torch.")))
        yield
    finally:
        for space, held_before in before:
            space.pop("forward", None)
            space.update(held_before)
        put_back(hooks)


def _unhooked(model: nn.Module, layers: Layers) -> list[Aside]:
    """Set aside hooks that would unpack these layers for good."""
    known = {module for module, _ in layers.values()}
    found = [one for one in layout.unpacking(model) if known.issuperset(one.layers)]
    return [(one.hooks, one.key, one.hooks.pop(one.key)) for one in found]


LOST = (
    "{} quantized layers ({}, ..) do not run in {}: there their dequantized weights are multiplied"
)
PACKED = "{}: the truth of its {} quantized layers is that of their dequantized weights"


def _is_taken(forward: Any, dtype: torch.dtype) -> bool:
    """Whether a forward is one of ours, which has a kernel for x of a dtype."""
    return isinstance(forward, Fused) and not forward.unlike(torch.empty(0, dtype=dtype))


def _dequantized(module: nn.Module, held: Held) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        bias = named(module, held.bias)
        c = None if bias is None else bias.to(x.dtype)
        return F.linear(x, dense(held.read(module), x.dtype), c)

    return forward


def _own(module: nn.Module, held: Held, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The layer's own code for x of a dtype; None where it does not run in it."""
    twin = twin_of(module)
    run = held.own or type(twin).forward

    def forward(x: Tensor) -> Tensor:
        made: Tensor = run(twin, x)
        return made

    weight = held.read(module)
    x = torch.zeros(1, weight.features, dtype=dtype, device=weight.values.device)
    try:
        with torch.no_grad():
            return forward if forward(x).dtype == dtype else None
    except Exception:  # whatever its code says to this dtype
        return None
