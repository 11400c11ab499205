"""Results that are not computed while a step is captured, because nobody may ask for them.

A kernel that has a norm inside needs no norm before it, and a product whose result is added to a
residual at once is one kernel with the sum. Whether that is so is known only by what comes next,
and what is computed later than it was asked for could find other values of x.

So nothing is ever computed later. A step is captured in passes: a result is left out, with the
place in the capture at which it was asked for (`Captures.position`). Where somebody reads it at
that very place, nothing has been launched in between by anybody, and so nothing written: it is
computed there. Where somebody reads it further on, the pass is void, and in the next one that
result is computed where it is asked for. A capture executes nothing, so that a void pass leaves
nothing behind. Only a pass in which nobody read too late becomes a graph.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import make_wrapper_subclass, no_torch_function, tree_map_only
from flashnorm.errors import FlashNormError

GONE = (
    "a result that a captured step left out was read after the capture had ended: in a graph there "
    "is no such value"
)
SHAPE = "a result that a captured step left out cannot be given another shape or dtype in place"
Where = tuple[object, ...]


class Pass:
    """One try to capture a step.

    `position` says how far the capture is, `early` which results are computed at once, by the order
    in which they are asked for, and `late` which others should have been; `loading`: nothing is
    captured yet, and kernels are run to be loaded.
    """

    def __init__(
        self,
        position: Callable[[], object],
        early: frozenset[int] | None = frozenset(),
        loading: bool = False,
    ) -> None:
        self.position, self.early, self.loading = position, early, loading
        self.late: set[int] = set()
        self.count, self.over = 0, False
        self._left: list[weakref.ref[Lazy]] = []

    def leave(
        self,
        like: tuple[torch.Size, torch.dtype, torch.device],
        reads: Sequence[Tensor],
        compute: Callable[[], Tensor],
        add: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What `compute` returns, or a tensor that stands for it.

        like: its shape, dtype and device; it is contiguous. reads: all that is read for it. add:
        what gives its sum with a residual in one kernel.
        """
        site, self.count = self.count, self.count + 1
        if self.loading or self.early is None or site in self.early:
            return compute()
        made = Lazy(*like)
        made.source = Source(self, site, tuple(reads), compute, add)
        self._left.append(weakref.ref(made))
        return made

    def end(self) -> None:
        """The pass is over: what somebody still has, and could read, should have been computed."""
        self.over = True
        for reference in self._left:
            left = reference()
            if left is not None and left.held is None:
                self.late.add(left.source.site)


class Source:
    """What a lazy result is computed from, and where in the capture it was asked for."""

    __slots__ = ("add", "compute", "memory", "owner", "place", "reads", "site")

    def __init__(
        self,
        owner: Pass,
        site: int,
        reads: tuple[Tensor, ...],
        compute: Callable[[], Tensor],
        add: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.owner, self.site, self.reads, self.compute, self.add = owner, site, reads, compute, add
        self.place, self.memory = owner.position(), _memory(reads)

    def is_here(self) -> bool:
        """Whether nothing was launched since, and all that is read lies where it lay."""
        return self.place == self.owner.position() and self.memory == _memory(self.reads)

    def can_add(self) -> bool:
        return self.add is not None and not self.owner.over and self.is_here()

    def value(self) -> Tensor:
        if self.owner.over:
            raise FlashNormError(GONE)
        if not self.is_here():
            self.owner.late.add(self.site)
        return self.compute()


def _memory(tensors: Sequence[Tensor]) -> list[Where]:
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]


class Lazy(Tensor):
    """A tensor that is computed when the first operation needs its values.

    `held` are the values, once they are there; `written`: somebody has a view of them, or wrote
    into them, so that nothing that was computed with them may be used any more.
    """

    source: Source
    held: Tensor | None
    written: bool

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Lazy:
        made: Lazy = make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.held, made.written = None, False
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def value(self) -> Tensor:
        """The values, as a plain tensor."""
        if self.held is None:
            self.held = self.source.value()
        return self.held

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # they may be left out
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.add.Tensor:
            found = _added(args, kwargs)
            if found is not None:
                return found
        shown = _shown(function, args, kwargs)
        plain = tree_map_only(Lazy, Lazy.value, (tuple(args), kwargs))
        result = function(*plain[0], **plain[1])
        for lazy in shown:
            lazy.written = True
            lazy._check()
            if result is lazy.held:  # an operation in place returns the tensor that it was given
                return lazy
        return result

    def _check(self) -> None:
        assert self.held is not None
        held = self.held
        if held.dtype != self.dtype or (held.shape, held.stride()) != (self.shape, self.stride()):
            raise FlashNormError(SHAPE)

    # What reads memory, or puts other memory in its place, without an operation.

    @property
    def data(self) -> Tensor:
        return self._open().data

    @data.setter
    def data(self, other: Tensor) -> None:
        self._open().data = value(other)
        self._check()

    def data_ptr(self) -> int:
        return self._open().data_ptr()

    def untyped_storage(self) -> Any:
        return self._open().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._open().__dlpack__(*args, **kwargs)

    def share_memory_(self) -> Any:
        return self._open().share_memory_()

    @property
    def __cuda_array_interface__(self) -> Any:
        return self._open().__cuda_array_interface__

    def numpy(self, *, force: bool = False) -> Any:
        return self._open().numpy(force=force)

    def tolist(self) -> Any:
        return self.value().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.value(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Lazy({list(self.shape)}, {self.dtype}, computed={self.held is not None})"

    def _open(self) -> Tensor:
        self.written = True
        return self.value()


def value(x: Any) -> Any:
    """The plain tensor that a lazy one stands for; anything else as it is."""
    return x.value() if type(x) is Lazy else x


def _shown(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Lazy]:
    """The lazy arguments that an operation writes into, or returns a view of."""
    found: list[Any] = []
    for place, argument in enumerate(function._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None:
            found += given if isinstance(given, (list, tuple)) else [given]
    return [x for x in found if type(x) is Lazy]


def _added(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """residual + product in one kernel, or None where it has to be two."""
    if len(args) != 2 or kwargs.keys() - {"alpha"} or kwargs.get("alpha", 1) != 1:
        return None
    for lazy, other in (args, args[::-1]):
        if type(lazy) is Lazy and lazy.held is None and lazy.source.can_add():
            residual = value(other)
            lazy.source.place = lazy.source.owner.position()  # what came in between is our own
            if _is_residual(residual, lazy):
                assert lazy.source.add is not None
                return lazy.source.add(residual)
    return None


def _is_residual(given: Any, lazy: Lazy) -> bool:
    return (
        type(given) in (Tensor, nn.Parameter)
        and given.shape == lazy.shape
        and given.dtype == lazy.dtype
        and given.device == lazy.device
        and given.is_contiguous()
        and not given.requires_grad
    )


class _Current(threading.local):
    step: Pass | None = None


_current = _Current()


def current() -> Pass | None:
    """The pass that this thread captures, or loads kernels for; None elsewhere."""
    return _current.step


@contextmanager
def within(step: Pass) -> Iterator[Pass]:
    """The context in which the forwards of a model belong to a pass."""
    before, _current.step = _current.step, step
    try:
        yield step
    finally:
        _current.step = before
        step.end()
