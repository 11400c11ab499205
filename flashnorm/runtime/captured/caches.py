"""Caches of fixed length, as graphs write them: their memory, and what the host knows of them.

A layer counts its tokens on the device, so that nobody waits for it. A layer with a window counts
on the host as well, which a graph cannot read: while a step is captured, that count is there for
the layer's own `update` alone, and whoever else asks for it makes the capture fail. A full window
is moved on without the constant that transformers copies to the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flashnorm.compat.transformers_names import WINDOW_COUNT, fixed_layer, window_layer
from flashnorm.errors import FlashNormError
from flashnorm.runtime.growing import is_theirs

OTHER = "the cache is not a static one of transformers that has been filled"
FULL = "the cache is full"
COUNTS = "a step of the model does more to its cache than append one token"


class Fixed:
    """A `StaticCache` as it is before a step."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.layers = weakref.ref(cache), cache.layers
        self.windows = [layer for layer in self.layers if type(layer) is window_layer()]
        whole = [layer for layer in self.layers if type(layer) is fixed_layer()]
        self.rooms = [layer.max_cache_len for layer in whole]
        self.lengths = [layer.cumulative_length for layer in whole]
        self.tensors = [
            t for layer in self.layers for t in (layer.keys, layer.values, layer.cumulative_length)
        ]

    def place(self) -> tuple[object, ...]:
        """Where it lies: a graph writes there and nowhere else."""
        return tuple(t.data_ptr() for t in self.tensors)

    def form(self) -> tuple[object, ...]:
        """Its shapes, and which of its windows are full: what else chooses what a step does."""
        shapes = tuple((t.shape, t.dtype, t.stride()) for t in self.tensors)
        full = tuple(vars(w)[WINDOW_COUNT] >= w.max_cache_len for w in self.windows)
        return shapes, full

    def counted(self) -> int | None:
        """The position of the next token, where the host counts it, or None."""
        first = self.layers[0]
        return vars(first)[WINDOW_COUNT] if type(first) is window_layer() else None

    def stepped(self) -> None:
        """A graph has appended a token: say what neither torch nor the host has noticed."""
        increment_version(self.tensors)
        for layer in self.windows:
            vars(layer)[WINDOW_COUNT] += 1


def find(cache: Any, device: torch.device) -> Fixed | str:
    """A cache that a graph may write, or why it may not."""
    from transformers import Cache

    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", True) or not isinstance(cache, Cache):
        return OTHER
    kinds = set(map(type, layers))
    if not kinds <= {fixed_layer(), window_layer()} or not all(map(is_theirs, {Cache, *kinds})):
        return OTHER
    if type(cache).update is not Cache.update or any("update" in vars(h) for h in (cache, *layers)):
        return OTHER
    if not all(layer.is_initialized for layer in layers):
        return OTHER
    if window_layer() in kinds and not _moves_on(window_layer().update):
        return OTHER
    found = Fixed(cache)
    if not all(type(t) is Tensor and t.device == device for t in found.tensors):
        return OTHER
    if any(t.is_inference() for t in found.tensors):
        return OTHER
    # Each is written by itself.
    return found if len(set(found.place())) == len(found.tensors) else OTHER


class Counts:
    """How many tokens the layers of a cache have, without asking the device at each step.

    Whoever writes a count in torch moves its version; then the device is asked once.
    """

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.used: list[int] = []

    def is_full(self, held: Fixed) -> bool:
        versions = [t._version for t in held.lengths]
        if versions != self.versions:
            self.used = torch.stack(held.lengths).tolist() if held.lengths else []
            self.versions = versions
        return any(used >= room for used, room in zip(self.used, held.rooms, strict=True))

    def stepped(self, held: Fixed) -> None:
        self.versions = [t._version for t in held.lengths]
        self.used = [used + 1 for used in self.used]


class _Counted:
    """What stands for the `update` of a layer with a window while a step is captured."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.count = layer, vars(layer).pop(WINDOW_COUNT)

    def __call__(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if self.count >= layer.max_cache_len and keys.shape[2] == 1:
            self.count += 1
            return _moved_on(layer, keys, values)
        held = vars(layer)
        held[WINDOW_COUNT] = self.count
        try:
            return type(layer).update(layer, keys, values, *args, **kwargs)
        finally:
            self.count = held.pop(WINDOW_COUNT)


def _moved_on(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A full window without its first position, and with a new last one."""
    for held, new in ((layer.keys, keys), (layer.values, values)):
        held.copy_(torch.cat([held[:, :, 1:], new], 2))
    return layer.keys, layer.values


@lru_cache
def _moves_on(of_layer: Any) -> bool:
    """Whether `update` of a layer whose window is full does that, and counts, and nothing else."""
    layers = [window_layer()(max_cache_len=3, sliding_window=3) for _ in "ab"]
    numbers = torch.arange(16.0).view(1, 2, 4, 2)
    for layer in layers:
        for i in range(3):
            of_layer(layer, numbers[:, :, i : i + 1], -numbers[:, :, i : i + 1])
    first, second = layers
    before, length = dict(vars(first)), first.cumulative_length.clone()
    found = of_layer(first, numbers[:, :, 3:], -numbers[:, :, 3:])
    _moved_on(second, numbers[:, :, 3:], -numbers[:, :, 3:])
    after = dict(vars(first))
    counted = after.pop(WINDOW_COUNT) == before.pop(WINDOW_COUNT) + 1
    return (
        counted
        and found[0] is first.keys
        and found[1] is first.values
        and torch.equal(first.keys, second.keys)
        and torch.equal(first.values, second.values)
        and torch.equal(first.cumulative_length, length)
        and after.keys() == before.keys()
        and all(after[name] is value for name, value in before.items())
    )


@contextmanager
def untouched(cache: Any) -> Iterator[None]:
    """A context after which the host's side of a cache is as it was; raises where a step does more.

    More than one token for each layer with a window, or another attribute of cache or layers.
    """
    objects = (cache, *cache.layers)
    before = [dict(vars(held)) for held in objects]
    counted = [_Counted(layer) for layer in cache.layers if type(layer) is window_layer()]
    counts = [(c, c.count) for c in counted]
    for each in counted:
        vars(each.layer)["update"] = each
    try:
        yield
        same = all(_same(vars(held), values) for held, values in zip(objects, before, strict=True))
        if not same or any(each.count != count + 1 for each, count in counts):
            raise FlashNormError(COUNTS)
    finally:
        for held, values in zip(objects, before, strict=True):
            vars(held).clear()
            vars(held).update(values)


def _same(held: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether the attributes are what they were, but for those that stand there for a capture."""
    ours = {"update", WINDOW_COUNT}
    return held.keys() - ours == before.keys() - ours and all(
        held[name] is value or _equal(held[name], value)
        for name, value in before.items()
        if name not in ours
    )


def _equal(a: Any, b: Any) -> bool:
    plain = (bool, int, float, str, type(None))
    return type(a) is type(b) and isinstance(a, plain) and a == b
