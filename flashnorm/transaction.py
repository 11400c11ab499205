"""Changes to a live model that are all made, or none: whatever fails meanwhile, even Ctrl-C.

A product with a gain cannot be divided out again without a rounding, so the values that are written
over are kept until everything is done: for a moment the changed weights are in memory twice.
Everything else goes back by reference.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flashnorm.compat.torch_names import without_dispatch_modes, without_torch_function

_ABSENT = object()


class Transaction:
    """A context: what was changed through it is as before where the context ends by an exception.

    Every step back is written down before its change is made.
    """

    def __init__(self) -> None:
        self._back: list[Callable[[], object]] = []
        self._kept: set[int] = set()

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with uninterrupted(), _nobody_between():
                while self._back:
                    self._back.pop()()
        self._back.clear()

    def values(self, tensor: Tensor) -> Tensor:
        """The tensor, whose values may be written over from now on."""
        if id(tensor) not in self._kept:
            target, before = tensor.detach(), tensor.detach().clone()
            self._back.append(lambda: target.copy_(before))
            self._kept.add(id(tensor))
        return tensor

    def item(self, held: dict[str, Any], key: str, value: Any) -> None:
        """`held[key] = value`, in the same place of the order."""
        before = held.get(key, _ABSENT)
        self._back.append(lambda: _put_back(held, key, before))
        held[key] = value

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`, for owners that keep their attributes in a `__dict__`."""
        before = vars(owner).get(name, _ABSENT)
        self._back.append(lambda: _put_back(vars(owner), name, before))
        setattr(owner, name, value)

    def data(self, tensor: Tensor, value: Tensor) -> None:
        """`tensor.data = value`: another dtype or device for the same object."""
        before = tensor.data
        self._back.append(lambda: setattr(tensor, "data", before))
        tensor.data = value

    def step(self, back: Callable[[], object]) -> None:
        """Write down how the change is undone that the caller makes next."""
        self._back.append(back)


def _put_back(held: dict[str, Any], key: str, before: Any) -> None:
    if before is _ABSENT:
        held.pop(key, None)
    else:
        held[key] = before


@contextmanager
def _nobody_between() -> Iterator[None]:
    """Modes of the caller (a profiler, a failure that is injected) see nothing of a way back."""
    with torch.no_grad(), without_dispatch_modes(), without_torch_function():
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the context ends. Only the main thread is ever interrupted by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[Any, ...]] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda *caught: waiting.append(caught))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[-1])
