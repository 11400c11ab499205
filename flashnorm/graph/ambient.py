"""What a model's code may change beside its model: it is as before once a recording is over.

Random states, flags of the process, and what the code keeps by itself: globals and class attributes
of the modules that define it, and what functions remember (`caches`).
"""

from __future__ import annotations

import os
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flashnorm.compat.torch_names import default_device, hooks_of_all
from flashnorm.graph.caches import Caches
from flashnorm.transaction import uninterrupted

_CONTAINERS = (dict, list, set, deque)
_DEEP = 3  # containers in containers of a namespace

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


@contextmanager
def undisturbed(kinds: Iterable[type]) -> Iterator[None]:
    """Put back whatever the code of modules of these kinds changes meanwhile outside of them."""
    classes = {c for kind in kinds for c in kind.__mro__ if _is_own(c)}
    kept = _Kept()
    for name in {c.__module__ for c in classes}:
        if (module := sys.modules.get(name)) is not None:
            kept.namespace(vars(module))
    for found in classes:
        kept.attributes(found)
    caches = Caches({c.__module__.partition(".")[0] for c in classes}, classes)
    settings = [(read(), read, write) for read, write in _settings()]
    hooks = [(held, dict(held)) for held in hooks_of_all()]
    try:
        caches.set_aside()
        yield
    finally:
        with uninterrupted():
            for held, before in hooks:
                _refill(held, before)
            for before, read, write in settings:
                if not _same(read(), before):
                    write(before)
            caches.put_back()
            kept.restore()


@contextmanager
def on_cpu() -> Iterator[None]:
    """What an analysis makes for itself lies on the CPU, whatever device is the default."""
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


def _is_own(kind: type) -> bool:
    root = kind.__module__.partition(".")[0]
    return root not in ("torch", "flashnorm") and root not in _BUILT_IN


_BUILT_IN = sys.stdlib_module_names - {"__main__"}


class _Kept:
    """Namespaces of code, and the containers in them, as they were."""

    def __init__(self) -> None:
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._spaces: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []

    def namespace(self, space: dict[str, Any]) -> None:
        self._spaces.append((space, _state_of(space)))
        for held in list(space.values()):
            self._look_into(held)

    def attributes(self, kind: type) -> None:
        self._classes.append((kind, _state_of(vars(kind))))
        for name, held in list(vars(kind).items()):
            if not (name.startswith("__") and name.endswith("__")):
                self._look_into(held)

    def _look_into(self, held: Any, depth: int = _DEEP) -> None:
        if isinstance(held, types.FunctionType):
            for inner in (held.__dict__, *(held.__defaults__ or ())):
                self._look_into(inner, depth - 1)
        if not isinstance(held, _CONTAINERS) or depth == 0 or id(held) in self._containers:
            return
        if len(held) > _LARGEST:
            return
        before = dict(dict.items(held)) if isinstance(held, dict) else list(held)
        self._containers[id(held)] = (held, before)
        for inner in before.values() if isinstance(before, dict) else before:
            self._look_into(inner, depth - 1)

    def restore(self) -> None:
        for held, before in self._containers.values():
            _refill(held, before)
        for space, before in self._spaces:
            for name in [n for n in _state_of(space) if n not in before]:
                del space[name]
            space.update({n: v for n, v in before.items() if space.get(n, _GONE) is not v})
        for kind, before in self._classes:
            now = _state_of(vars(kind))
            for name in [n for n in now if n not in before]:
                type.__delattr__(kind, name)
            for name, value in before.items():
                if vars(kind).get(name, _GONE) is not value:
                    type.__setattr__(kind, name, value)


_GONE = object()
_LARGEST = 1 << 16  # entries of a table that is data, not state


def _state_of(space: Any) -> dict[str, Any]:
    """The names that hold state: no code, no module, nothing of Python's own."""
    code = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, staticmethod)
    return {
        name: held
        for name, held in list(space.items())
        if not (name.startswith("__") and name.endswith("__"))
        and not isinstance(held, (*code, classmethod, property))
    }


def _refill(held: Any, before: Any) -> None:
    """Give a container the entries that it had, where it has others now."""
    now = dict(dict.items(held)) if isinstance(held, dict) else list(held)
    if len(now) == len(before) and _same_entries(now, before):
        return
    if isinstance(held, dict):
        dict.clear(held)
        for key, value in before.items():
            dict.__setitem__(held, key, value)
        return
    held.clear()
    held.update(before) if isinstance(held, set) else held.extend(before)


def _same_entries(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        pairs = zip(now.items(), before.items(), strict=True)
        return all(k is j and v is w for (k, v), (j, w) in pairs)
    return all(new is old for new, old in zip(now, before, strict=True))


def _settings() -> list[Setting]:
    """Flags of the process and the thread, and random states: how to read and to write them."""
    sdp = torch.backends.cuda
    found: list[Setting] = [
        (random.getstate, random.setstate),
        (torch.get_rng_state, torch.set_rng_state),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_default_dtype, torch.set_default_dtype),
        (default_device, _set_default_device),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
        (sdp.flash_sdp_enabled, sdp.enable_flash_sdp),
        (sdp.mem_efficient_sdp_enabled, sdp.enable_mem_efficient_sdp),
        (sdp.math_sdp_enabled, sdp.enable_math_sdp),
        (sdp.cudnn_sdp_enabled, sdp.enable_cudnn_sdp),
        (sys.getrecursionlimit, sys.setrecursionlimit),
        (lambda: dict(os.environ), _set_environment),
        (lambda: list(warnings.filters), _set_filters),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    if (numpy := sys.modules.get("numpy")) is not None:
        found.append((numpy.random.get_state, numpy.random.set_state))
    return found


def _set_default_device(before: Any) -> None:
    torch.set_default_device(getattr(before, "device", None))


def _set_environment(before: dict[str, str]) -> None:
    """Name by name: another thread may read one that did not change."""
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _set_filters(before: list[Any]) -> None:
    warnings.filters[:] = before  # type: ignore[index]


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, torch.Tensor):
        return torch.equal(now, before)
    if isinstance(now, (tuple, list)) and len(now) == len(before):
        return all(_same(new, old) for new, old in zip(now, before, strict=True))
    if hasattr(now, "tobytes"):
        return bool(now.tobytes() == before.tobytes())
    return bool(now == before)
