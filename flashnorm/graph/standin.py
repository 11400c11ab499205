"""A stand-in for a model: whatever a forward may change is a copy, so the model stays as it is.

Modules, configs, containers, hooks with what they close over, and all other Python objects that
can be reached from the model are copied, each once; shared objects stay shared among the copies. No
code of the user's runs meanwhile: no constructor, no `__deepcopy__`, no `train()`. What cannot hold
state of a model (classes, files, locks, loggers, the standard library's own objects) is shared.
Tensors are left to `Tensors`: fakes, which need no memory, or real copies.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import random
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flashnorm.graph.offload import FORWARD, HOOK

T = TypeVar("T")

_ATOMS = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented)),
        *(range, slice, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
        *(types.BuiltinFunctionType, types.CodeType, types.ModuleType, types.GetSetDescriptorType),
        *(types.MappingProxyType, property, staticmethod, classmethod),
    }
)
# Classes of the standard library that only hold what they were given.
_OPEN_MODULES = frozenset({"__main__", "collections", "types", "functools", "argparse", "typing"})
# A graph of its own that a forward does not change, and that refers to itself a thousandfold.
_CLOSED_PACKAGES = ("torch.fx", "torch._dynamo", "torch._inductor", "torch.distributed", "sympy")
# They know how to copy themselves, and run nobody's code for it.
_SELF_COPYING = (random.Random,)


class Copies:
    """Makes the copies. `tensor_of` gives the stand-in of a tensor."""

    def __init__(self, tensor_of: Callable[[Tensor], Tensor]) -> None:
        self._tensor_of = tensor_of
        self._made: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept alive: an id stands for one object only
        self._unfilled: deque[Callable[[], None]] = deque()
        self._hashed: deque[Callable[[], None]] = deque()

    def of(self, original: T) -> T:
        """The copy of anything, with all that can be reached from it."""
        made = self._of(original)
        while self._unfilled or self._hashed:
            # What is hashed comes last, when the objects that are its keys are whole.
            (self._unfilled or self._hashed).popleft()()
        return made

    def has(self, original: Any) -> bool:
        """Whether something stands for it already."""
        return id(original) in self._made

    def stands_for(self, original: Any, made: Any) -> None:
        """Say what stands for an object, before it is copied."""
        self._keep(original, made)

    def _of(self, item: Any) -> Any:
        kind = type(item)
        if kind in _ATOMS or isinstance(item, (type, Enum)):
            return item
        if id(item) in self._made:
            return self._made[id(item)]
        make = _maker(kind)  # type: ignore[arg-type]
        return self._keep(item, make(self, item))

    def _keep(self, item: Any, made: Any) -> Any:
        self._made[id(item)] = made
        self._originals.append(item)
        return made

    def _later(self, fill: Callable[..., None], *args: Any) -> None:
        self._unfilled.append(functools.partial(fill, *args))

    def tensor(self, item: Tensor) -> Tensor:
        made = self._keep(item, self._tensor_of(item))
        if made is not item and getattr(item, "__dict__", None):
            self._later(self._fill_missing, item, made)
        return made

    def _fill_missing(self, item: Tensor, made: Tensor) -> None:
        """What somebody has written on a tensor; a fake one has attributes of its own."""
        for key, held in list(vars(item).items()):
            if key not in vars(made):
                vars(made)[key] = self._of(held)

    def mapping(self, item: dict[Any, Any]) -> Any:
        base: Any = next(b for b in (OrderedDict, defaultdict, dict) if isinstance(item, b))
        made = base.__new__(type(item))
        if base is defaultdict:
            made.default_factory = self._of(item.default_factory)  # type: ignore[attr-defined]
        self._hashed.append(functools.partial(self._fill_mapping, base, item, made))
        self._later(self._fill_attributes, item, made)
        return made

    def _fill_mapping(self, base: Any, item: Any, made: Any) -> None:
        # The class's own methods may refuse, count or tell somebody.
        for key, held in list(base.items(item)):
            base.__setitem__(made, self._of(key), self._of(held))

    def sequence(self, item: list[Any]) -> Any:
        made = list.__new__(type(item))
        self._later(self._fill_sequence, item, made)
        self._later(self._fill_attributes, item, made)
        return made

    def _fill_sequence(self, item: list[Any], made: list[Any]) -> None:
        list.extend(made, [self._of(held) for held in list.__iter__(item)])

    def queue(self, item: deque[Any]) -> Any:
        made = deque.__new__(type(item))
        deque.__init__(made, (), item.maxlen)
        self._later(lambda: made.extend([self._of(held) for held in list(item)]))
        return made

    def set(self, item: set[Any]) -> Any:
        made = set.__new__(type(item))
        self._hashed.append(lambda: set.update(made, [self._of(held) for held in list(item)]))
        return made

    def fixed(self, item: tuple[Any, ...] | frozenset[Any]) -> Any:
        """Tuples and frozen sets; one whose members need no copy is shared."""
        held = list(item)
        made = [self._of(member) for member in held]
        if all(new is old for new, old in zip(made, held, strict=True)):
            return item
        base: Any = tuple if isinstance(item, tuple) else frozenset
        try:
            return base.__new__(type(item), made)
        except TypeError:  # the named results of torch's operations
            return type(item)(made)

    def method(self, item: types.MethodType) -> Any:
        owner = self._of(item.__self__)
        if owner is item.__self__:
            return item
        # A method of a class is code; a function bound by hand may close over something.
        function = item.__func__
        known = any(function is held for c in type(owner).__mro__ for held in vars(c).values())
        return types.MethodType(function if known else self._of(function), owner)

    def partial(self, item: functools.partial[Any]) -> Any:
        parts = self._of(item.func), self._of(item.args), self._of(item.keywords)
        made: Any = type(item)(parts[0], *parts[1])
        # The keywords may be filled later: hence the copied dict itself.
        made.__setstate__((parts[0], parts[1], parts[2], None))
        self._later(self._fill_attributes, item, made)
        return made

    def reference(self, item: weakref.ref[Any]) -> Any:
        target = item()
        if target is None or type(item) is not weakref.ref:
            return item
        made = self._of(target)
        return item if made is target else weakref.ref(made)

    def function(self, item: types.FunctionType) -> Any:
        """A function that was put on an object: a hook, a patched forward, a closure.

        What it closes over is copied, and the globals that the code of a user's script or notebook
        names; those of an installed library are looked after by `ambient`.
        """
        names, writes = _globals_of(item)
        if not item.__closure__ and not names and not writes and not _has_state(item):
            return item
        cells = tuple(types.CellType() for _ in item.__closure__ or ())
        space = {**item.__globals__} if names or writes else item.__globals__
        made = types.FunctionType(item.__code__, space, item.__name__, None, cells or None)
        made.__qualname__, made.__module__ = item.__qualname__, item.__module__
        self._keep(item, made)
        self._later(self._fill_function, item, made, cells, names)
        return made

    def _fill_function(
        self, item: Any, made: Any, cells: tuple[Any, ...], names: dict[str, Any]
    ) -> None:
        made.__defaults__ = self._of(item.__defaults__)
        made.__kwdefaults__ = self._of(item.__kwdefaults__)
        for old, new in zip(item.__closure__ or (), cells, strict=True):
            try:
                new.cell_contents = self._of(old.cell_contents)
            except ValueError:
                continue  # an empty cell: a name that is not bound yet
        for name, held in names.items():
            made.__globals__[name] = self._of(held)
        self._fill_attributes(item, made)

    def generator(self, item: torch.Generator) -> torch.Generator:
        made = torch.Generator(item.device)
        made.set_state(item.get_state())
        return made

    def self_copying(self, item: Any) -> Any:
        return copy.copy(item)

    def namespace(self, item: types.SimpleNamespace) -> Any:
        made = type(item)()
        self._later(self._fill_attributes, item, made)
        return made

    def script(self, item: Any) -> Any:
        """TorchScript runs code of its own on tensors of its own."""
        return copy.deepcopy(item)

    def shared(self, item: T) -> T:
        return item

    def instance(self, item: Any) -> Any:
        """An object of a Python class, without its constructor; shared where that is not safe."""
        if not getattr(item, "__dict__", None) and not _slots_of(item):
            return item  # nothing in it can change: a sentinel, which is known by its identity
        try:
            made = object.__new__(type(item))
        except TypeError:
            return item  # it is made by C code
        self._later(self._fill_attributes, item, made)
        return made

    def _fill_attributes(self, item: Any, made: Any) -> None:
        if (held := getattr(item, "__dict__", None)) is not None:
            vars(made).update({key: self._of(part) for key, part in list(held.items())})
        for slot in _slots_of(item):
            try:
                slot.__set__(made, self._of(slot.__get__(item, type(item))))
            except AttributeError:
                continue  # a slot that was never filled


_MAKERS: tuple[tuple[Any, Callable[[Copies, Any], Any]], ...] = (
    (Tensor, Copies.tensor),
    (torch.jit.ScriptModule, Copies.script),
    (nn.Module, Copies.instance),
    (dict, Copies.mapping),
    (list, Copies.sequence),
    (deque, Copies.queue),
    (set, Copies.set),
    ((tuple, frozenset), Copies.fixed),
    (types.MethodType, Copies.method),
    (functools.partial, Copies.partial),
    (types.FunctionType, Copies.function),
    (weakref.ref, Copies.reference),
    (torch.Generator, Copies.generator),
    (types.SimpleNamespace, Copies.namespace),
    (_SELF_COPYING, Copies.self_copying),
)


@functools.lru_cache(maxsize=4096)
def _maker(kind: type) -> Callable[[Copies, Any], Any]:
    """How objects of a class are copied."""
    for base, make in _MAKERS:
        if issubclass(kind, base):
            return make
    module = kind.__module__
    if module.partition(".")[0] == "numpy":
        # Arrays, and generators of random numbers; what is fixed copies itself for nothing.
        return Copies.self_copying
    closed = f"{module}.".startswith(tuple(f"{name}." for name in _CLOSED_PACKAGES))
    library = module.partition(".")[0] in sys.stdlib_module_names and module not in _OPEN_MODULES
    if closed or library or hasattr(kind, "__del__"):
        return Copies.shared
    return Copies.instance


def _slots_of(item: object) -> tuple[Any, ...]:
    return _slots(type(item))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[Any, ...]:
    """The attributes of a class that its objects hold outside of a `__dict__`."""
    members = [m for c in kind.__mro__ for m in vars(c).values() if inspect.ismemberdescriptor(m)]
    return tuple(m for m in members if not m.__objclass__.__module__.startswith("builtins"))


def _has_state(function: types.FunctionType) -> bool:
    """Whether a function keeps anything with itself: attributes, defaults that may change."""
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return bool(function.__dict__) or any(type(held) not in _ATOMS for held in defaults)


def _globals_of(function: types.FunctionType) -> tuple[dict[str, Any], bool]:
    """The globals that a user's own function names and that may change; whether it assigns any."""
    code, space = function.__code__, function.__globals__
    if _is_installed(code.co_filename):
        return {}, False
    names, writes = _names(code)
    held = {name: space[name] for name in names if name in space}
    return {n: h for n, h in held.items() if not isinstance(h, (type, types.ModuleType))}, writes


@functools.lru_cache(maxsize=4096)
def _is_installed(file: str) -> bool:
    library = file.startswith(sys.base_prefix) or file.startswith("<frozen")
    return library or "site-packages" in file or "dist-packages" in file


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """All names that code looks up outside of itself, and whether it assigns one of them."""
    found = list(codes(code))
    names = frozenset(name for inner in found for name in inner.co_names)
    writes = any(i.opname == "STORE_GLOBAL" for c in found for i in dis.get_instructions(c))
    return names, writes


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and all that are written inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def evaluating(model: nn.Module) -> nn.Module:
    """A stand-in as it runs in evaluation mode, by its flags: `eval` may be somebody's own code.

    What compiles a module, moves its weights in and out, or runs several of its layers at once is
    left out: its own forward is what counts.
    """
    for module in model.modules():
        state = vars(module)
        if isinstance(module, torch.jit.ScriptModule):
            module.eval()
            continue
        if "training" in state:
            state["training"] = False
        state.pop("_compiled_call_impl", None)
        if state.pop(HOOK, None) is not None and FORWARD in state:
            state["forward"] = state.pop(FORWARD)
        if "dynamo_ctx" in state and "_orig_mod" in module._modules:
            state["forward"] = module._modules["_orig_mod"]
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model
