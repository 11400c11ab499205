"""Whether a module is still what was recorded: what its forward may read, at the price of a look.

A kernel stands for the code of a module as it was seen. So before each call what that code could
read is compared with what it was: class and forward, `training`, every attribute that is a plain
value, which parameters there are, the objects and globals that the code names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from flashnorm.runtime.names import named_in, outer_values

TRAINING = "the module is in another mode than it was recorded in (eval)"
CHANGED = "the module is not what was recorded: an attribute, its class or its code has changed"
STORES = "its forward stores attributes, which a kernel would not"
OPAQUE = "its forward reads {}, a {} that could change without notice"

# Who listens to a module.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What torch keeps in every module, which is compared otherwise or says nothing of its results.
_TORCH = frozenset(nn.Module().__dict__) | {"forward", "_compiled_call_impl"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, range)
_MISSING = object()


class Watch:
    """One module, as it was when this was made; `modes` where `training` has to stay off.

    settles: attributes that may change, because nothing depends on them.
    """

    def __init__(
        self, module: nn.Module, modes: bool = True, settles: frozenset[str] = frozenset()
    ) -> None:
        self.module, self.kind, self.settles = module, type(module), settles
        self.code = self.kind.forward
        self.names = named_in(self.kind)
        held = module.__dict__
        plain = [name for name in held if self._is_compared(name, held[name])]
        # The parameters are compared by identity: their dict and what is in it.
        self.expected = {"training": False} if modes else {}
        self.expected |= {name: _frozen(held[name]) for name in plain}
        self.parameters = module._parameters
        self.calls: dict[str, Any] = {}  # what is compared of who is called, by `include_calls`
        self.objects = self._objects(held, plain)
        self.outer = outer_values(self.kind)
        self.buffers = _shown(module._buffers)
        self.absent = [name for name, p in self.parameters.items() if p is None]
        self.noticed = self.names.all - _TORCH - settles
        self.seen = frozenset(held)
        self._arrange()

    def _arrange(self) -> None:
        """All that a look needs in one tuple: reading it attribute by attribute takes longer."""
        expected = {**self.expected, **self.calls}
        # Twice the parameters, because of one name alone there is no tuple.
        pick = itemgetter("_parameters", "_parameters", *expected)
        values = (self.parameters, self.parameters, *expected.values())
        more = bool(self.objects or self.outer or self.buffers)
        parameters = (self.parameters, len(self.parameters), tuple(self.absent))
        self.look = (
            self.module,
            self.kind,
            self.code,
            pick,
            values,
            parameters,
            len(self.seen),
            more,
        )

    def include_calls(self) -> None:
        """From now on a hook is a change as well, and another forward than the module has now."""
        held = self.module.__dict__
        self.calls = {name: {} for name in HOOKS}
        if "forward" in held:
            self.calls["forward"] = held["forward"]
        self.noticed |= {"forward"}
        self.seen |= {"forward"} & held.keys()
        self._arrange()

    def _is_compared(self, name: str, value: Any) -> bool:
        if name in self.settles:
            return False
        if name in _TORCH or (name.startswith("_") and name not in self.names.all):
            return False
        return is_plain(value)

    def _objects(
        self, held: Mapping[str, Any], plain: Sequence[str]
    ) -> list[tuple[str, Any, dict[str, Any]]]:
        """(name, object, its own plain attributes) of what the forward names and is not plain."""
        found = []
        for name, value in held.items():
            known = name in plain or name in _TORCH or name in self.settles
            if name in self.names.all and not known:
                inside = getattr(value, "__dict__", None) or {}
                kept = {n: _frozen(v) for n, v in inside.items() if n in self.names.all}
                found.append((name, value, {n: v for n, v in kept.items() if is_plain(v)}))
        return found

    def why_not(self) -> str:
        """Why this module cannot be watched, so that it has to run itself; empty if it can be."""
        if self.names.stores:
            return STORES
        for name, value, inside in self.objects:
            if callable(value) or isinstance(value, Tensor):  # a tensor that is read was recorded
                continue
            if not inside:
                return OPAQUE.format(name, type(value).__name__)
        return ""

    def changed(self) -> bool:
        """Whether the module is in training, or anything that its forward could read is new."""
        module, kind, code, pick, values, (parameters, many, absent), count, more = self.look
        held = module.__dict__
        try:
            for name in absent:
                if parameters[name] is not None:
                    return True
            return (
                pick(held) != values
                or (type(module) is not kind and not self._is_alike(type(module)))
                or type(module).forward is not code
                or len(parameters) != many
                or (len(held) != count and self._added(held))
                or (more and self._differs(held))
            )
        except (KeyError, AttributeError, RuntimeError, ValueError, TypeError):
            return True  # it is gone, or cannot be compared with what it was

    def _is_alike(self, kind: type) -> bool:
        """Whether a class that the module was given since adds nothing that its code names.

        That is how `fully_shard` marks a module.
        """
        if not issubclass(kind, self.kind):
            return False
        added = kind.__mro__[: kind.__mro__.index(self.kind)]
        return not any(self.names.all & vars(c).keys() for c in added)

    def _added(self, held: Mapping[str, Any]) -> bool:
        """Whether there is an attribute now, that was not there before, and that the code names."""
        if self.noticed & (held.keys() - self.seen):
            return True
        self.seen = frozenset(held)
        self._arrange()
        return False

    def _differs(self, held: Mapping[str, Any]) -> bool:
        """The rest, which few modules have."""
        for name, value, inside in self.objects:
            if held.get(name) is not value:
                return True
            for inner, expected in inside.items():
                if value.__dict__.get(inner, _MISSING) != expected:
                    return True
        for where, name, expected in self.outer:
            if sys.modules[where].__dict__.get(name, _MISSING) != expected:
                return True
        return bool(self.buffers) and _shown(self.module._buffers) != self.buffers

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """With the code as it was seen, whatever the class has now."""
        twin = Watch.__new__(Watch)
        memo[id(self)] = twin
        twin.__dict__.update({name: deepcopy(v, memo) for name, v in self.__dict__.items()})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without the code, which may have no name to be found by: it is that of the class."""
        return {name: v for name, v in self.__dict__.items() if name not in ("code", "look")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.code = self.kind.forward
        self._arrange()

    def changed_in_graph(self) -> bool:
        """`changed` as a compiled graph guards it: what is read here is checked at every call."""
        module = self.module
        for name, expected in self.expected.items():
            if getattr(module, name) != expected:
                return True
        return any(getattr(module, name) is not None for name in self.absent)

    def summary(self) -> tuple[Any, ...]:
        """What two modules have in common whose forwards do the same; may not be hashable."""
        held = [(n, p is not None and (p.shape, p.dtype)) for n, p in self.parameters.items()]
        objects = [(name, id(value)) for name, value, _ in self.objects]
        plain = tuple((n, v) for n, v in self.expected.items() if n in self.names.all)
        return self.kind, self.code, plain, tuple(held), self.buffers, tuple(objects)


def _shown(buffers: Mapping[str, Tensor | None]) -> tuple[tuple[str, bool], ...]:
    """Which buffers there are; what is in them was recorded if anybody read it."""
    return tuple((name, buffer is None) for name, buffer in buffers.items())


def is_plain(value: Any) -> bool:
    """Whether a value is compared by what it is: numbers, names, and collections of them."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return isinstance(value, _PLAIN) or (type(value).__module__ == "torch" and _is_token(value))


def _is_token(value: Any) -> bool:
    return type(value).__name__ in ("dtype", "device", "memory_format", "layout")


def _frozen(value: Any) -> Any:
    """A copy that stays as it is when the value is changed in place."""
    if isinstance(value, list):
        return [_frozen(item) for item in value]
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return set(value) if isinstance(value, set) else value
