"""Whether a module does in another dtype what it was seen to do: it is recorded again, by itself.

On tensors without memory, so that no number of the module's own is ever the answer of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import FakeTensorMode
from flashnorm.graph.affine import Normed
from flashnorm.graph.fusible import Gated, Linear, find_fusible
from flashnorm.graph.packed import Product, become_product, find_held, named
from flashnorm.graph.standin import Copies
from flashnorm.graph.trace import trace
from flashnorm.runtime.watch import Watch

Told = Linear | Gated | Normed

OTHER = "in {} the module does something else than it was seen to do, or returns another dtype"
UNKNOWN = "what the module does in {} is not known: restore_ and accelerate again in it"

# Modules of one class with the same attributes and shapes do the same.
_known: dict[Any, str] = {}
MOST = 4096


def why_not(module: nn.Module, told: Told | None, shape: Sequence[int], dtype: torch.dtype) -> str:
    """Why a kernel may not stand for the module once it is moved to a dtype; empty where it may.

    `told` is what the module was seen to do, with names as the module has them itself, given a
    tensor of this shape.
    """
    if told is None:
        return UNKNOWN.format(dtype)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    key = (told, dtype, device.type, tuple(shape), _summary(module))
    try:
        hash(key)
    except TypeError:
        return _recorded(module, told, shape, dtype, device)
    if key not in _known:
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = _recorded(module, told, shape, dtype, device)
    return _known[key]


def _summary(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, Watch(inner).summary()) for name, inner in module.named_modules())


def _recorded(
    module: nn.Module, told: Told, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> str:
    try:
        with torch.inference_mode(False), torch.no_grad():
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with mode:
                x = torch.empty(tuple(shape), dtype=dtype, device=device)
            twin = _twin(module, mode, dtype)
            found = find_fusible(trace(twin, [(x,)], allow_real=False))
    except Exception as error:
        return f"{UNKNOWN.format(dtype)} ({type(error).__name__})"
    kinds: dict[type, dict[str, Any]] = {Linear: found.linears | found.turned, Gated: found.gated}
    seen = kinds.get(type(told), found.norms).get("")
    return "" if seen == told and dtype in found.kept[""] else OTHER.format(dtype)


def _twin(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """A module like this one, without memory, hooks and other forwards; all inside it as well.

    What is packed inside of it is the product that it was seen to be.
    """
    copies, layers = Copies(partial(_moved, mode, dtype)), find_held(module).values()
    for inner, held in layers:
        weight, shape = named(inner, held.weight), held.read(inner).shape
        assert weight is not None
        with mode:
            made = nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))
        copies.stands_for(weight, made)
    twin = copies.of(module)
    for inner, held in layers:
        made = copies.of(named(inner, held.weight))  # type: ignore[assignment]
        become_product(copies.of(inner), held, made, Product(held.weight, held.bias))
    for inner in twin.modules():
        state = vars(inner)
        state.pop("forward", None)
        for name in [name for name in state if name.endswith("_hooks")]:
            state[name].clear()
    return twin


def _moved(mode: FakeTensorMode, dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """A tensor without memory, in the dtype if it is one of numbers with a point."""
    fake = mode.from_tensor(tensor)
    moved = fake.to(dtype) if fake.is_floating_point() else fake
    return nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
