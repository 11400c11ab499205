"""Whether a whole model is what was traced: every module of it, at the price of a glance.

Between two tokens the weights have passed through the caches, so that every line of memory that is
looked at is waited for. So the dictionaries that make up a model are asked for their versions, and
looked through only where one has another.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from flashnorm.compat.torch_names import dict_version
from flashnorm.runtime.laid import wrapped
from flashnorm.runtime.names import named_in
from flashnorm.runtime.watch import CHANGED, HOOKS, is_plain

HOOKED = "a module inside of the model has hooks"
_Table = dict[str, Any]
_OPEN = (list, dict, set)


class Still:
    """A model as it was when this was made."""

    def __init__(self, model: nn.Module) -> None:
        parts = list(model.modules())
        self.root, self.inner = model, parts[1:]
        self.held = [dict(vars(part)) for part in self.inner]
        self.kinds = list(map(type, parts))
        self.parts = parts
        self.tables: list[Any] = [t for part in parts for t in (part._parameters, part._buffers)]
        self.tensor_names = list(chain.from_iterable(self.tables))
        self.missing = [t is None for t in chain.from_iterable(map(dict.values, self.tables))]
        self.children = [part._modules for part in parts]
        self.child_names = list(chain.from_iterable(self.children))
        self.child_modules = list(chain.from_iterable(map(dict.values, self.children)))
        self.hooks = [vars(part)[name] for part in self.inner for name in HOOKS]
        self.pick_root, self.root_values = _picked(vars(model), read_by(model))
        self.classes = _classes(parts)
        self.class_held = [dict(vars(kind)) for kind in self.classes]
        self.globals = [_picked(space, _names(space)) for space in _spaces(self.classes)]
        self.spaces = _spaces(self.classes)
        self.configs = _configs(parts)
        self.settings = [copy.deepcopy(_plain(vars(config))) for config in self.configs]
        # What can change within a value of a config, which its dictionary does not notice.
        self.open = [v for c in self.configs for v in vars(c).values() if isinstance(v, _OPEN)]
        self.open_values = copy.deepcopy(self.open)
        # What packed weights are made of, by identity: their tensors cannot be compared.
        self.wrapped = wrapped(model)
        self.wrapped_values = _ids(self.wrapped)
        self.dicts: list[Any] = [
            *self.wrapped,
            *map(vars, self.inner),
            *(part._parameters for part in parts),
            # Of those without any, which are most, code cannot have read one.
            *(table for part in parts for table in (part._buffers, part._modules) if table),
            *self.spaces,
            *map(vars, self.configs),
        ]
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return list(map(dict_version, self.dicts))

    def changed(self) -> str:
        """Why the model is not what it was; empty where it is."""
        try:
            versions = self._versions()
            if any(self.hooks):
                return HOOKED
            if versions != self.versions:
                if not self._same():
                    return CHANGED
                self.versions = versions
            return "" if self._same_classes() else CHANGED
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return CHANGED  # it is gone, or cannot be compared with what it was

    def _same(self) -> bool:
        return (
            _ids(self.wrapped) == self.wrapped_values
            and list(map(vars, self.inner)) == self.held
            and list(chain.from_iterable(self.tables)) == self.tensor_names
            and [t is None for t in chain.from_iterable(map(dict.values, self.tables))]
            == self.missing
            and list(chain.from_iterable(self.children)) == self.child_names
            and list(chain.from_iterable(map(dict.values, self.children))) == self.child_modules
            and all(
                pick(space) == values
                for space, (pick, values) in zip(self.spaces, self.globals, strict=True)
            )
            and all(
                setting == _plain(vars(config))
                for config, setting in zip(self.configs, self.settings, strict=True)
            )
        )

    def _same_classes(self) -> bool:
        """What no version stands for: the root, where `generate` writes, classes and lists."""
        return (
            list(map(type, self.parts)) == self.kinds
            and self.pick_root(vars(self.root)) == self.root_values
            and list(map(vars, self.classes)) == self.class_held
            and self.open == self.open_values
        )


def _ids(tables: Iterable[_Table]) -> list[dict[str, int]]:
    return [{name: id(value) for name, value in table.items()} for table in tables]


def _picked(held: _Table, names: Iterable[str]) -> tuple[Callable[[_Table], Any], Any]:
    """What reads these names, and what it finds now."""
    chosen = list(names)
    if not chosen:
        return (lambda _: ()), ()
    pick = itemgetter(*chosen)
    return pick, pick(held)


def read_by(model: nn.Module) -> list[str]:
    """The attributes of the root that its forward names, and its mode.

    The others are those of `generate`, which keeps there what it likes.
    """
    own = {"_parameters", "_buffers", "_modules"}
    named = named_in(type(model)).all - own - {"forward"}
    return sorted(vars(model).keys() & named | {"training"} | own)


def _classes(parts: list[nn.Module]) -> list[type]:
    kinds = {kind: None for part in parts for kind in type(part).__mro__}
    return [kind for kind in kinds if kind is not nn.Module and issubclass(kind, nn.Module)]


def _spaces(classes: list[type]) -> list[_Table]:
    names = {kind.__module__: None for kind in classes if not kind.__module__.startswith("torch.")}
    return [vars(sys.modules[name]) for name in names if name in sys.modules]


def _names(space: _Table) -> list[str]:
    return [name for name in space if not name.startswith("__")]


def _configs(parts: list[nn.Module]) -> list[Any]:
    found: dict[int, Any] = {}
    for part in parts:
        for value in vars(part).values():
            if hasattr(value, "sub_configs") and not isinstance(value, (Tensor, nn.Module)):
                for config in (value, *_inside(value)):
                    found[id(config)] = config
    return list(found.values())


def _inside(config: Any) -> Iterable[Any]:
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            yield inner
            yield from _inside(inner)


def _plain(held: _Table) -> _Table:
    return {name: value for name, value in held.items() if is_plain(value)}
