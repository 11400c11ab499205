"""The caches that a compiled step reads and writes: of a fixed length, or growing.

A growing cache is given a room: its keys and values are moved into the first positions of longer
tensors once, and are views of them from then on. The step writes behind the views, and the next
views are one longer. A view that somebody keeps never changes: where the cache has other tensors
than the last views, it is given another room.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashnorm.compat.transformers_names import fixed_layer, growing_layer
from flashnorm.runtime.growing import is_theirs

ROOM = "_flashnorm_room"
FULL = "the cache is full, or longer than the package"
OTHER = "the cache is not one that the package takes"


class Shapes:
    """The tensors of a cache of fixed length, one for keys and one for values of each layer."""

    def __init__(self, layers: Sequence[Any]) -> None:
        tensors = [*(layer.keys for layer in layers), *(layer.values for layer in layers)]
        self.layers = len(layers)
        self.sizes = [tuple(t.shape) for t in tensors]
        self.dtypes = [t.dtype for t in tensors]
        self.length = self.sizes[0][2]

    def fit(self, tensors: Sequence[Any], length: int) -> bool:
        """Whether these are such tensors of this length, of any strides."""
        return len(tensors) == len(self.sizes) and all(
            type(t) is Tensor and t.is_cpu and t.dtype == dtype and t.shape == (*b, length, d)
            for t, (*b, _, d), dtype in zip(tensors, self.sizes, self.dtypes, strict=True)
        )


class Fixed:
    """A `StaticCache` of the package's length, for one step."""

    def __init__(self, tensors: list[Tensor], lengths: list[Tensor]) -> None:
        self.tensors, self.lengths = tensors, lengths
        self.used = int(lengths[0])

    def stepped(self) -> None:
        """The step has counted by itself."""


class Room:
    """Longer tensors, whose first positions are the keys and values of a growing cache."""

    def __init__(self, shapes: Shapes, layers: Sequence[Any], used: int) -> None:
        self.layers, self.used = list(layers), used
        same = len({*zip(shapes.sizes, shapes.dtypes, strict=True)}) == 1
        if same:  # one tensor, so that all views are made by two operations
            whole = _zeros((len(shapes.sizes), *shapes.sizes[0]), shapes.dtypes[0])
            self.whole: Tensor | None = whole
            self.tensors = list(whole.unbind(0))
        else:
            self.whole = None
            pairs = zip(shapes.sizes, shapes.dtypes, strict=True)
            self.tensors = [_zeros(size, dtype) for size, dtype in pairs]
        self.places = [tensor.data_ptr() for tensor in self.tensors]
        self.lengths = [torch.tensor(used) for _ in layers]
        held = [*(layer.keys for layer in layers), *(layer.values for layer in layers)]
        for tensor, found in zip(self.tensors, held, strict=True):
            tensor[:, :, :used].copy_(found)
        self._show()

    def _show(self) -> None:
        if self.whole is not None:
            self.views = list(self.whole.narrow(3, 0, self.used).unbind(0))
        else:
            self.views = [tensor.narrow(2, 0, self.used) for tensor in self.tensors]
        count = len(self.layers)
        for layer, keys, values in zip(
            self.layers, self.views[:count], self.views[count:], strict=True
        ):
            layer.keys, layer.values = keys, values

    def is_of(self, layers: Sequence[Any]) -> bool:
        """Whether the cache still has the very tensors that it was given last."""
        if len(layers) != len(self.layers) or not all(map(_is, layers, self.layers)):
            return False
        held = [layer.keys for layer in layers] + [layer.values for layer in layers]
        # `keys.data = other` keeps the object.
        return all(map(_is, held, self.views)) and all(
            view.data_ptr() == place and view.shape[2] == self.used
            for view, place in zip(held, self.places, strict=True)
        )

    def stepped(self) -> None:
        """Show one more position, which the step has written."""
        self.used += 1
        self._show()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_room, ()  # a copy of the cache gets its own


def _zeros(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written: a sequence seldom fills its room.

    Huge pages would come faster, but in them strips of 2ⁿ bytes share the sets of the caches: after
    8000 tokens of SmolLM2-135M in float32 a token took 52 ms instead of 40.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(size, dtype=dtype)
    count = math.prod(size)
    pages = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(size)


def _no_room() -> None:
    """What a copy of a cache has in the place of a room."""


def _is(a: Any, b: Any) -> bool:
    return a is b


def find(cache: Any, shapes: Shapes) -> Fixed | Room | str:
    """The tensors of a cache for one step, or why the package cannot take it."""
    kinds = set(map(type, getattr(cache, "layers", ())))
    if len(kinds) != 1 or getattr(cache, "offloading", True) or _names_more(cache):
        return OTHER
    if (kind := kinds.pop()) is fixed_layer():
        found: Fixed | Room | str = _fixed(cache.layers, shapes)
    elif kind is growing_layer():
        found = _room(cache, shapes)
    else:
        return OTHER
    if not isinstance(found, str) and found.used >= shapes.length:
        return FULL
    return found


def _names_more(cache: Any) -> bool:
    """Whether somebody else's code may do more than keep what it is given."""
    from transformers import Cache

    kinds = (Cache, type(cache.layers[0]))
    return (
        type(cache).update is not Cache.update
        or not all(map(is_theirs, kinds))
        or any("update" in vars(held) for held in (cache, *cache.layers))
    )


def _fixed(layers: Sequence[Any], shapes: Shapes) -> Fixed | str:
    tensors = [layer.keys for layer in layers] + [layer.values for layer in layers]
    lengths = [layer.cumulative_length for layer in layers]
    if not shapes.fit(tensors, shapes.length) or not all(t.is_contiguous() for t in tensors):
        return OTHER
    if not all(type(n) is Tensor and n.dtype == torch.int64 and n.is_cpu for n in lengths):
        return OTHER
    # Each is written by itself; and a layer counts on from where the others are.
    places = {tensor.data_ptr() for tensor in (*tensors, *lengths)}
    if len(places) != 3 * len(layers) or len({n.item() for n in lengths}) != 1:
        return OTHER
    return Fixed(tensors, lengths)


def _room(cache: Any, shapes: Shapes) -> Room | str:
    layers = cache.layers
    room = vars(cache).get(ROOM)
    if type(room) is Room and room.is_of(layers):
        return room
    tensors = [layer.keys for layer in layers] + [layer.values for layer in layers]
    if not isinstance(tensors[0], Tensor) or tensors[0].dim() != 4:
        return OTHER
    used = tensors[0].shape[2]
    if used >= shapes.length:
        return FULL
    if not shapes.fit(tensors, used):
        return OTHER
    room = Room(shapes, layers, used)
    vars(cache)[ROOM] = room
    return room
