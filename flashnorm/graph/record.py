"""Recording: a dispatch mode that writes down every ATen operation of a forward pass.

Tensors are told apart by identity and storage, so views taken behind the dispatcher's back are
still recognized. In-place operations make new versions of every live tensor that shares the memory.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import (
    DispatchKey,
    FakeTensor,
    TorchDispatchMode,
    has_kernel,
    tree_flatten,
)
from flashnorm.errors import TraceError
from flashnorm.graph.ir import SHARED_MEMORY, Call, Graph, Node, Origin, Ref, Value

ALIAS_WRITE = "alias_write"
ALIAS_READ = "alias_read"
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclass(frozen=True)
class Geometry:
    """Where a tensor lies in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> Geometry:
        return Geometry(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


class ForeignWrite(TraceError):
    """A forward is about to write to memory that is the user's."""


class Recorder(TorchDispatchMode):
    """Writes every operation that runs under it into `graph`.

    `owned` is the memory that the recording may write to, beside what its own operations make: an
    operation that would write to any other (a tensor that is the user's) raises ForeignWrite first.
    """

    def __init__(self, owned: Iterable[int] = ()) -> None:
        super().__init__()
        self.graph = Graph()
        self._owned, self._foreign = set(owned), set[int]()
        self._ids: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._sharing: dict[int, list[Tensor]] = defaultdict(list)
        self._stack: list[tuple[str, int]] = [("", 0)]
        self._calls = 0

    def add(self, tensor: Tensor, origin: Origin, name: str = "") -> int:
        """Declare a tensor that no recorded operation made."""
        if _storage(tensor) not in self._owned:
            self._foreign.add(_storage(tensor))
        value = self._new_value(tensor, origin, -1, name)
        self._bind(tensor, value)
        return value

    def own(self, tensor: Tensor) -> None:
        """Declare that the recording may write to a tensor's memory."""
        self._owned.add(_storage(tensor))
        self._foreign.discard(_storage(tensor))

    def share(self, tensor: Tensor, other: str) -> None:
        """Declare that a parameter lies in the memory of another tensor, and so is read by it."""
        args = (Ref(self.value_of(tensor)),)
        node = Node(SHARED_MEMORY, _cannot_run, args, {}, (), "", 0, other)
        self.graph.nodes.append(node)

    def alias(self, tensor: Tensor, value: int) -> None:
        """Declare that another tensor object stands for a known value."""
        self._bind(tensor, value)

    def value_of(self, tensor: Tensor) -> int:
        """The value that a tensor holds now; a tensor never seen before is a constant."""
        known = self._ids.get(id(tensor))
        if known is not None:
            return known
        geometry = Geometry.of(tensor) if _has_storage(tensor) else None
        sharing = self._sharing.get(_storage(tensor), ())
        for other in sharing:
            if Geometry.of(other) == geometry:
                value = self._ids[id(other)]
                self._bind(tensor, value)
                return value
        if sharing:
            return self._view_of(tensor, [self._ids[id(other)] for other in sharing])
        return self.add(tensor, "constant")

    def _view_of(self, tensor: Tensor, sources: list[int]) -> int:
        """A view that nobody recorded of memory that is known: a reading of all that lies there."""
        value = self._new_value(tensor, "computed", len(self.graph.nodes))
        args = tuple(Ref(source) for source in dict.fromkeys(sources))
        self._note(ALIAS_READ, _cannot_run, args, {}, (value,), sys._getframe(2))
        self._bind(tensor, value)
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_metadata(func):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and _is_composite(func):
            with self:  # in inference mode nobody takes it apart before us
                return func.decompose(*args, **kwargs)
        recorded_args = self._encode(args)
        recorded_kwargs = {key: self._encode(item) for key, item in kwargs.items()}
        written = _written(func, args, kwargs)
        self._check_owned(written, func)
        out = func(*args, **kwargs)
        index = len(self.graph.nodes)
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        fresh = {id(t): self._new_value(t, "computed", index) for t in (*written, *results)}
        outputs = tuple(dict.fromkeys(fresh[id(t)] for t in (*results, *written)))
        name = _base_name(func)
        self._note(name, func, recorded_args, recorded_kwargs, outputs, sys._getframe(1))
        for tensor in written:
            self._write(tensor, fresh[id(tensor)])
        for tensor in results:
            self._bind(tensor, fresh[id(tensor)])
            self._owned.update({_storage(tensor)} - self._foreign)
        return out

    def _check_owned(self, written: list[Tensor], func: Any) -> None:
        for tensor in written:
            if not isinstance(tensor, FakeTensor) and _storage(tensor) not in self._owned:
                where = f"{func} at {_source(sys._getframe(2))}"
                raise ForeignWrite(f"its forward writes to a tensor that is not its own ({where})")

    def _note(
        self, op: str, func: Any, args: Any, kwargs: Any, outputs: Any, frame: FrameType
    ) -> None:
        path, call = self._stack[-1]
        node = Node(op, func, args, kwargs, outputs, path, call, _source(frame))
        self.graph.nodes.append(node)

    def watch(self, model: nn.Module) -> None:
        """Keep track of which module of a model runs, by hooks that come before all others.

        The hooks stay: only a stand-in is watched.
        """
        for path, part in model.named_modules():
            if not isinstance(part, torch.jit.ScriptModule):
                enter, leave = partial(self._enter, path), partial(self._leave, path)
                nn.Module.register_forward_pre_hook(part, enter, prepend=True)
                nn.Module.register_forward_hook(part, leave, prepend=True, always_call=True)

    def _enter(self, path: str, module: nn.Module, given: Any) -> None:
        call = Call(path, self._values_in(given), _count_arguments(type(module).forward))
        self._calls += 1
        self.graph.calls[self._calls] = call
        self._stack.append((path, self._calls))

    def _leave(self, path: str, module: nn.Module, given: Any, output: Any) -> None:
        if self._stack[-1][0] == path:  # else another hook failed before the module was entered
            call = self._stack.pop()[1]
            self.graph.calls[call].returned = self._values_in(output)

    def _values_in(self, tree: Any) -> tuple[int, ...]:
        items = tree if isinstance(tree, (tuple, list)) else (tree,)
        return tuple(self.value_of(item) for item in items if isinstance(item, Tensor))

    def _encode(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return Ref(self.value_of(tree))
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._encode(item) for item in tree)
        return tree

    def _new_value(self, tensor: Tensor, origin: Origin, node: int, name: str = "") -> int:
        self.graph.values.append(Value(tuple(tensor.shape), tensor.dtype, origin, node, name))
        return len(self.graph.values) - 1

    def _bind(self, tensor: Tensor, value: int) -> None:
        if id(tensor) not in self._ids:
            # Kept alive, so that no id and no storage address is ever used twice.
            self._alive.append(tensor)
            self._sharing[_storage(tensor)].append(tensor)
        self._ids[id(tensor)] = value

    def _write(self, target: Tensor, value: int) -> None:
        """Give every other live tensor over the written memory a new version."""
        old = self._ids[id(target)]
        written = Geometry.of(target) if _has_storage(target) else None
        self._ids[id(target)] = value
        for other in list(self._sharing.get(_storage(target), ())):
            if other is target:
                continue
            if Geometry.of(other) == written:
                self._ids[id(other)] = value
                continue
            self._write_alias(other, value, old, written)

    def _write_alias(self, other: Tensor, value: int, old: int, written: Geometry | None) -> None:
        fresh = self._new_value(other, "computed", len(self.graph.nodes))
        args = (Ref(self._ids[id(other)]), Ref(value), Geometry.of(other), written)
        self._note(ALIAS_WRITE, _cannot_run, args, {}, (fresh,), sys._getframe(3))
        self._ids[id(other)] = fresh


@lru_cache(maxsize=4096)
def _count_arguments(forward: Any) -> int:
    """How many arguments a forward takes beside the module itself."""
    return len(inspect.signature(forward).parameters) - 1


def _cannot_run(*_: Any) -> Any:
    raise RuntimeError("what was done through an alias cannot be replayed")


def _base_name(func: Any) -> str:
    name = func._schema.name.split("::")[-1]
    if name == "view" and func._schema.overload_name == "dtype":
        return "view_as_dtype"  # reinterprets the bits, moves no element
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _is_metadata(func: Any) -> bool:
    """Questions about shapes and devices, which read no element."""
    namespace, name = func._schema.name.split("::")
    return namespace == "prim" or name.startswith("sym_") or name == "is_contiguous"


@lru_cache(maxsize=4096)
def _is_composite(func: Any) -> bool:
    """Whether an operation is nothing but a sequence of others."""
    return bool(has_kernel(func.name(), DispatchKey.CompositeImplicitAutograd))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that the operation writes in place."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        item = kwargs.get(argument.name, args[position] if position < len(args) else None)
        found += [t for t in tree_flatten(item)[0] if isinstance(t, Tensor)]
    return found


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has its elements in memory; a subclass that wraps others has theirs."""
    return tensor.layout == torch.strided and not hasattr(type(tensor), "__tensor_flatten__")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if _has_storage(tensor) else -id(tensor)


def _source(frame: FrameType | None) -> str:
    """`file.py:line` of the innermost frame outside torch and this package."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _OURS)) and not name.startswith("<"):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown source"
