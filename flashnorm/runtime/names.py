"""What the code of a module's forward names: attributes, and the globals it depends on.

Python's code objects list every name and text in them. The forward, the methods and properties of
its class that it names, and the functions of its own files that it calls are read; torch's are not.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from flashnorm.graph.standin import codes


class Names(NamedTuple):
    """Names in the code of a forward, and whether it stores any attribute."""

    all: frozenset[str]
    stores: bool


_CONSTANTS = (bool, int, float, str, type(None))


def named_in(kind: Any) -> Names:
    """The names in the forward of a class and in what it calls."""
    return _named_in(kind, kind.forward)


@functools.lru_cache(maxsize=1024)
def _named_in(kind: type, forward: Any) -> Names:
    names: set[str] = set()
    stores = False
    for function in _functions(kind, forward):
        for code in codes(function.__code__):
            names.update(_names(code))
            stores = stores or any(
                op.opname in ("STORE_ATTR", "DELETE_ATTR") for op in dis.get_instructions(code)
            )
    return Names(frozenset(names), stores)


def outer_values(kind: type[nn.Module]) -> list[tuple[str, str, Any]]:
    """(module, name, value) of the plain globals that the forward of a class depends on."""
    found: dict[tuple[str, str], Any] = {}
    for function in _functions(kind, kind.forward):
        space, where = function.__globals__, function.__module__
        if getattr(sys.modules.get(where), "__dict__", None) is not space:
            continue
        for code in codes(function.__code__):
            for name in code.co_names:
                if name in space and isinstance(space[name], _CONSTANTS):
                    found[where, name] = space[name]
    return [(*key, value) for key, value in found.items() if not key[1].startswith("__")]


def _functions(kind: type, forward: Any) -> Iterator[FunctionType]:
    """The forward, and what of its class and files it calls."""
    seen: set[int] = set()
    waiting = [forward]
    while waiting:
        function = inspect.unwrap(_plain(waiting.pop()), stop=lambda f: id(f) in seen)
        if not isinstance(function, FunctionType) or id(function) in seen or _is_torch(function):
            continue
        seen.add(id(function))
        yield function
        names = {name for code in codes(function.__code__) for name in _names(code)}
        for owner in kind.__mro__:
            if owner not in (nn.Module, object):
                waiting += [_plain(owner.__dict__[name]) for name in names & owner.__dict__.keys()]
        waiting += [function.__globals__[name] for name in names & function.__globals__.keys()]
        waiting += [c.cell_contents for c in function.__closure__ or () if _is_filled(c)]


def _is_torch(function: FunctionType) -> bool:
    """Torch's modules are read as others are; its helpers know no module but by arguments."""
    where = function.__module__ or ""
    return where.startswith("torch.") and not where.startswith("torch.nn.modules.")


def _is_filled(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, FunctionType)
    except ValueError:
        return False


def _plain(item: Any) -> Any:
    """The function of a method or property."""
    if isinstance(item, property):
        return item.fget
    if isinstance(item, functools.cached_property):
        return item.func
    return getattr(item, "__func__", item)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from (text for text in code.co_consts if isinstance(text, str))
