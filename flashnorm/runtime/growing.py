"""A growing cache of transformers is appended to in place, not copied for every token.

    keys [B, H, t, D] ‖ new [B, H, m, D] → keys [B, H, t + m, D]

`DynamicCache` concatenates. Here the keys and values of a layer are the first positions of longer
tensors: what is new is written behind them, and the next keys are a longer view. A view that
somebody keeps never changes: where a layer has other tensors than the last views, it gets a room of
its own. It happens within the forward of an accelerated model alone, without gradients; outside of
it the cache is as transformers made it, but for keys and values that are views.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashnorm.compat.transformers_names import growing_layer
from flashnorm.kernels import dispatch
from flashnorm.runtime.stand import Stand

ROOM = "_flashnorm_room"
DEVICE = "cpu"  # the type of the device on which caches are appended to
LEAST, SHARE = 256, 8  # positions of room: so many, or this part of those in use


class Room:
    """Longer tensors of one layer, and the views of them that it was given last."""

    __slots__ = ("held", "longer")

    def __init__(self, held: tuple[Tensor, Tensor], count: int) -> None:
        used = held[0].shape[2]
        more = used + count + max(LEAST, used // SHARE)
        self.held, self.longer = held, tuple(_longer(tensor, more) for tensor in held)

    def fits(self, held: tuple[Tensor, Tensor], count: int) -> bool:
        """Whether a layer that has these tensors can be given so many positions more."""
        (keys, values), (first, second) = self.held, self.longer
        return (
            held[0] is keys
            and held[1] is values
            and _begins(keys, first)
            and _begins(values, second)
            and keys.shape[2] + count <= first.shape[2]
            # Tensors of inference mode are written in it only, and others are not made in it.
            and first.is_inference() == torch.is_inference_mode_enabled()
        )

    def append(self, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        used, count = self.held[0].shape[2], new[0].shape[2]
        for longer, given in zip(self.longer, new, strict=True):
            longer.narrow(2, used, count).copy_(given)
        keys, values = (longer.narrow(2, 0, used + count) for longer in self.longer)
        self.held = keys, values
        return self.held

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_room, ()  # a copy of the layer gets its own


def _no_room() -> None:
    """What a copy of a layer has in the place of a room."""


def _begins(view: Tensor, longer: Tensor) -> bool:
    """Whether a view still is what it was made as: `view.data = other` makes it another one."""
    return view.data_ptr() == longer.data_ptr() and view.stride() == longer.stride()


def _longer(tensor: Tensor, positions: int) -> Tensor:
    batch, heads, used, width = tensor.shape
    made = tensor.new_empty((batch, heads, positions, width))
    made.narrow(2, 0, used).copy_(tensor)
    return made


class _Update:
    """What stands for a cache's `update` during a forward."""

    def __init__(self, cache: Any, kind: type[Any]) -> None:
        self.cache, self.kind = cache, kind

    def __call__(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layers, new = self.cache.layers, (key_states, value_states)
        if layer_idx < len(layers) and not (args or kwargs):
            layer = layers[layer_idx]
            if type(layer) is self.kind and "update" not in vars(layer):
                held = layer.keys, layer.values
                if _appends(held, new):
                    layer.keys, layer.values = _room(layer, held, new).append(new)
                    return layer.keys, layer.values
        found: tuple[Tensor, Tensor] = type(self.cache).update(
            self.cache, key_states, value_states, layer_idx, *args, **kwargs
        )
        return found


def _room(layer: Any, held: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Room:
    room, count = vars(layer).get(ROOM), new[0].shape[2]
    if type(room) is not Room or not room.fits(held, count):
        room = vars(layer)[ROOM] = Room(held, count)
    return room


def _appends(held: tuple[Any, Any], new: tuple[Any, Any]) -> bool:
    """Whether new keys and values are of the form of those that a layer has, on the CPU."""
    if torch.is_grad_enabled() or not new[0].shape[2] == new[1].shape[2] > 0:
        return False
    return all(map(_alike, held, new)) and held[0].shape[2] == held[1].shape[2] > 0


def _alike(held: Any, new: Any) -> bool:
    if not (type(held) is type(new) is Tensor and held.dtype == new.dtype and new.is_cpu):
        return False
    if held.dim() != 4 or new.dim() != 4 or not held.is_cpu:
        return False
    (batch, heads, _, width), shape = held.shape, new.shape
    return (batch, heads, width) == (shape[0], shape[1], shape[3])


class Growing(Stand):
    """A model's own forward, during which a growing cache is appended to in place."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run(self.module, args, kwargs)


def run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a module's class, with its cache in place where it is a growing one."""
    forward = type(module).forward
    if torch.compiler.is_compiling() or (found := _growing(kwargs)) is None:
        return forward(module, *args, **kwargs)
    held = vars(found)
    held["update"] = _Update(found, growing_layer())
    try:
        return forward(module, *args, **kwargs)
    finally:
        held.pop("update", None)


def _growing(kwargs: dict[str, Any]) -> Any:
    """The cache of a call that may be written in place, or None."""
    found = kwargs.get("past_key_values")
    if found is None or torch.is_grad_enabled() or dispatch.watched() or dispatch.transformed():
        return None
    from transformers import Cache, DynamicCache, EncoderDecoderCache

    if type(found) is EncoderDecoderCache:
        found = found.self_attention_cache  # the other one does not grow
    if type(found) is not DynamicCache or found.offloading or "update" in vars(found):
        return None
    if type(found).update is not Cache.update or not is_theirs(Cache):
        return None
    return found if is_theirs(growing_layer()) and _concatenates(growing_layer().update) else None


def is_theirs(kind: type[Any]) -> bool:
    """Whether `update` of a class of transformers' caches still is the code of its own file."""
    code = getattr(kind.update, "__code__", None)
    return code is not None and code.co_filename == sys.modules[kind.__module__].__file__


@cache
def _concatenates(of_layer: Any) -> bool:
    """Whether a layer's `update` does what this stands for, and nothing beside it."""
    layer, numbers = growing_layer()(), torch.arange(24.0).view(1, 2, 3, 4)
    for given in (numbers, numbers[:, :, 1:]):
        before = dict(vars(layer))
        of_layer(layer, given, -given)
    joined = torch.cat([numbers, numbers[:, :, 1:]], 2)
    changed = {name for name, value in vars(layer).items() if before.get(name) is not value}
    whole = torch.equal(layer.keys, joined) and torch.equal(layer.values, -joined)
    return whole and changed == {"keys", "values"} and before.keys() == vars(layer).keys()
