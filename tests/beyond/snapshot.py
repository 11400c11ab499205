"""Everything that can be reached from a model, and the state of the process: by identity and value.

A snapshot keeps what it saw alive, so that an identity is never used twice.
"""

from __future__ import annotations

import builtins
import gc
import hashlib
import logging
import os
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# Not walked: what belongs to the interpreter or to torch, not to a model.
OPAQUE = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.FrameType)
MOST = 300_000


class Snapshot:
    """`differences` between two snapshots of one model are what was changed in between."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[int, Any]] = {}
        self._kept: dict[int, Any] = {}
        self._paths: dict[int, str] = {}

    @classmethod
    def of(cls, *roots: Any) -> Snapshot:
        snapshot = cls()
        snapshot._walk(roots)
        for name, value in process_state().items():
            snapshot.entries[f"process: {name}"] = (0, value)
        return snapshot

    def differences(self, later: Snapshot) -> list[str]:
        """What is not the same object any more, or not of the same content."""
        found = []
        for path, (identity, content) in self.entries.items():
            if path not in later.entries:
                found.append(f"{path}: gone")
                continue
            identity_later, content_later = later.entries[path]
            if identity != identity_later:
                found.append(f"{path}: another object")
            if content != content_later:
                found.append(f"{path}: {_short(content)} became {_short(content_later)}")
        found += [f"{path}: new" for path in later.entries if path not in self.entries]
        return found

    def _walk(self, roots: tuple[Any, ...]) -> None:
        waiting = deque((f"{type(root).__name__}", root) for root in roots)
        while waiting and len(self.entries) < MOST:
            path, item = waiting.popleft()
            if isinstance(item, PLAIN):
                self.entries[path] = (0, item if item == item else "nan")
                continue
            known = self._paths.setdefault(id(item), path)
            if known != path:
                self.entries[path] = (id(item), f"as {known}")
                continue
            self._kept[id(item)] = item
            self.entries[path] = (id(item), _content(item))
            waiting.extend((f"{path}{step}", part) for step, part in _parts(item))


def _short(content: Any) -> str:
    return str(content)[:120]


def _content(item: Any) -> Any:
    """What makes two states of one object equal, beside its parts."""
    kind = type(item).__qualname__
    if isinstance(item, Tensor):
        return (kind, *_tensor_content(item))
    if isinstance(item, numpy.ndarray):
        return (kind, item.shape, str(item.dtype), item.tobytes() if item.dtype != object else 0)
    if isinstance(item, torch.Generator):
        return (kind, _digest(item.get_state()))
    if isinstance(item, Mapping):
        return (kind, tuple(map(_key, item)))
    if isinstance(item, (set, frozenset)):
        return (kind, tuple(sorted(map(_key, item))))
    if isinstance(item, (list, tuple, deque)):
        return (kind, len(item))
    return (kind,)


def _key(key: Any) -> str:
    return repr(key) if isinstance(key, (*PLAIN, tuple)) else f"{type(key).__name__}#{id(key)}"


def _tensor_content(tensor: Tensor) -> tuple[Any, ...]:
    shape = (tuple(tensor.shape), str(tensor.dtype), str(tensor.device), tensor.requires_grad)
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return (*shape, "no numbers")
    try:
        layout = (tuple(tensor.stride()), tensor.storage_offset(), tensor.data_ptr())
        return (*shape, *layout, _digest(tensor))
    except (RuntimeError, NotImplementedError):  # sparse, or a class that hides its memory
        return (*shape, repr(tensor))


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    data = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _parts(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, OPAQUE):
        return
    if isinstance(item, Tensor):
        if item.grad_fn is None and item.is_leaf and item.grad is not None:
            yield ".grad", item.grad
        yield from _attributes(item)
    elif isinstance(item, Mapping):
        for key in list(item):
            yield f"[{_key(key)}]", item[key]
        yield from _attributes(item)
    elif isinstance(item, (list, tuple, deque)):
        yield from ((f"[{index}]", part) for index, part in enumerate(item))
        yield from _attributes(item)
    elif isinstance(item, types.FunctionType):
        yield from _function_parts(item)
    elif isinstance(item, types.MethodType):
        yield ".__self__", item.__self__
        yield ".__func__", item.__func__
    elif isinstance(item, nn.Module) or type(item).__module__ != builtins.__name__:
        yield from _attributes(item)


def _attributes(item: Any) -> Iterator[tuple[str, Any]]:
    held = getattr(item, "__dict__", None)
    if isinstance(held, dict):
        yield ".__dict__", held
    for cls in type(item).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                try:
                    yield f".{name}", object.__getattribute__(item, name)
                except AttributeError:
                    continue


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a hook may hold: closures, defaults and attributes."""
    for index, cell in enumerate(function.__closure__ or ()):
        try:
            yield f".cell[{index}]", cell.cell_contents
        except ValueError:
            continue
    yield ".defaults", function.__defaults__
    yield ".__dict__", function.__dict__


def process_state() -> dict[str, Any]:
    """Flags, hooks, modes and random states that belong to the process."""
    hooks = {
        name: tuple(map(_key, held))
        for name, held in vars(global_hooks).items()
        if name.startswith("_global") and isinstance(held, dict)
    }
    numbers = {
        "torch random": _digest(torch.get_rng_state()),
        "python random": hash(random.getstate()),
        "numpy random": hash(numpy.random.get_state()[1].tobytes()),
    }
    return {**hooks, **numbers, **_torch_flags(), **_interpreter_flags()}


def _torch_flags() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "mkldnn": torch.backends.mkldnn.enabled,
        "sdpa math": torch.backends.cuda.math_sdp_enabled(),
        "sdpa flash": torch.backends.cuda.flash_sdp_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "anomaly": torch.is_anomaly_enabled(),
        "dispatch modes": tuple(type(m).__name__ for m in _get_current_dispatch_mode_stack()),
        "function modes": torch._C._len_torch_function_stack(),
    }


def _is_heard() -> Iterator[bool]:
    """Whether what is logged passes every filter."""
    record = logging.makeLogRecord({"msg": "", "levelno": logging.ERROR})
    for name in ("", "flashnorm", "torch", "torch._subclasses.fake_tensor", "transformers"):
        logger = logging.getLogger(name)
        yield from (bool(each.filter(record)) for each in (logger, *logger.handlers))


def _interpreter_flags() -> dict[str, Any]:
    return {
        "logging disabled": logging.root.manager.disable,
        "root log level": logging.root.level,
        "log filters": tuple(_is_heard()),
        "warning filters": len(warnings.filters),
        "garbage collection": gc.isenabled(),
        "recursion limit": sys.getrecursionlimit(),
        "folder": os.getcwd(),
        "environment": tuple(sorted(os.environ.items())),
    }
