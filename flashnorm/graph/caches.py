"""Functions that remember their results, while a recording runs code that asks them.

A result of a recording may be a fake tensor, which must not come up in a later call, and what the
user's program has remembered must stay: some programs rely on getting the very same object again.
So functions that begin with nothing stand in their places meanwhile.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import types
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import torch

CACHE = type(functools.lru_cache(lambda: None))
# What a tensor cannot be in, or that is part of every cache.
_WITHOUT_TENSORS = (
    *(str, bytes, int, float, complex, type(None), type, Enum, logging.Logger),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device),
)
_CONTAINERS = (dict, list, tuple, set, frozenset)

Place = tuple[Any, str, Any]  # a module or a class, a name in it, and the function there


class Caches:
    """The remembering functions in some packages and classes, under all of their names there."""

    def __init__(self, roots: Iterable[str], kinds: Iterable[type]) -> None:
        count = len(sys.modules)
        self._places = [place for root in roots for place in _places_of(root, count)]
        self._places += [
            (kind, name, held) for kind in kinds for name, held in _caches_in(vars(kind))
        ]
        found = {id(cache): cache for _, _, cache in self._places}
        self._misses = [(cache, cache.cache_info().misses) for cache in found.values()]
        self._empty = {number: _empty(cache) for number, cache in found.items()}

    def set_aside(self) -> None:
        for owner, name, cache in self._places:
            if vars(owner).get(name) is cache:
                _assign(owner, name, self._empty[id(cache)])

    def put_back(self) -> None:
        for owner, name, cache in self._places:
            if vars(owner).get(name) is self._empty[id(cache)]:
                _assign(owner, name, cache)
        for cache, misses in self._misses:
            # It was called by another way than these names: then no tensor may stay in it.
            if cache.cache_info().misses != misses and not _is_without_tensors(cache):
                cache.cache_clear()


@functools.lru_cache(maxsize=64)
def _places_of(root: str, _modules: int) -> list[Place]:
    """Those of one package, as far as it is imported: looked up again when more modules are."""
    return [
        (module, name, held)
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] == root and isinstance(module, types.ModuleType)
        for name, held in _caches_in(vars(module))
    ]


def _caches_in(space: Any) -> Iterator[tuple[str, Any]]:
    return ((name, held) for name, held in list(space.items()) if type(held) is CACHE)


def _empty(cache: Any) -> Any:
    """The same function, which has remembered nothing yet."""
    made = functools.lru_cache(**cache.cache_parameters())(cache.__wrapped__)
    vars(made).update(vars(cache))
    return made


def _assign(owner: Any, name: str, held: Any) -> None:
    if isinstance(owner, type):
        type.__setattr__(owner, name, held)
    else:
        vars(owner)[name] = held


def _is_without_tensors(cache: Any) -> bool:
    """Whether nothing that it remembers, arguments or results, can be or hold a tensor."""
    return all(_is_plain(held) for held in gc.get_referents(cache))


def _is_plain(held: Any) -> bool:
    if type(held) is object or isinstance(held, _WITHOUT_TENSORS):
        return True
    if type(held).__name__ == "_lru_list_elem":  # what it links stands beside it
        return True
    if not isinstance(held, _CONTAINERS):
        return False
    parts = [*held, *held.values()] if isinstance(held, dict) else held
    return all(_is_plain(part) for part in parts)
