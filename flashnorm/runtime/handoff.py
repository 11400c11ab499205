"""What a norm has precomputed for its readers: left with its output, and taken from there, once.

Nothing that can happen to a tensor is forbidden between a norm and its reader: not everything that
writes leaves a trace (`x.data`, `x.numpy()`, a swap of the memory). So a reader takes a result only
where the values that it is given are, bit for bit, those that the result was computed from. While
a step is captured there are no values yet, and the version of the tensor has to do; a compiled
graph is made of what was seen while it was traced.

This is the only place that hands work from a norm to its readers.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import forward_hooks_of_all, forward_pre_hooks_of_all
from flashnorm.kernels import dispatch
from flashnorm.runtime.lazy import Lazy

# By bits, so that a NaN is what it was and -0 is not 0; torch.equal takes ten times as long.
_compare = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Precomputed:
    """Results for the readers of a tensor, and the values that they were computed from."""

    __slots__ = ("copy", "dtype", "found", "place", "shape", "size")

    def __init__(self, z: Tensor, found: dict[Any, Tensor]) -> None:
        self.found, self.dtype, self.shape = found, z.dtype, z.shape
        self.place, self.size = z.data_ptr(), z.nbytes
        self.copy = ctypes.string_at(self.place, self.size)

    def take(self, x: Tensor, reader: Any) -> Tensor | None:
        """The reader's result, once, if x holds what it was computed from."""
        if x.dtype is not self.dtype or x.shape != self.shape or not x.is_contiguous():
            return None
        if x.data_ptr() != self.place:  # which may be that of a tensor that is gone by now
            return None
        if _compare(self.place, self.copy, self.size):
            return None
        return self.found.pop(reader, None)


class Captured:
    """The same while a step is captured: what writes in place is told by the tensor's version.

    But for what goes past it (`x.data`); hooks that could are excluded.
    """

    __slots__ = ("found", "place", "version")

    def __init__(self, z: Tensor, found: dict[Any, Tensor]) -> None:
        self.found, self.version, self.place = found, z._version, z.data_ptr()

    def take(self, x: Tensor, reader: Any) -> Tensor | None:
        """The reader's result, once, if x is as it was returned."""
        if x._version != self.version or x.data_ptr() != self.place:
            return None
        return self.found.pop(reader, None)


class Unread:
    """The same for a tensor that is not computed yet, which knows who wrote into it."""

    __slots__ = ("found", "owner")

    def __init__(self, z: Lazy, found: dict[Any, Tensor]) -> None:
        self.found, self.owner = found, weakref.ref(z)

    def take(self, x: Lazy, reader: Any) -> Tensor | None:
        """The reader's result, once, if x is what was returned, and nobody wrote into it."""
        if x is not self.owner() or x.written:
            return None
        return self.found.pop(reader, None)


def leave(z: Tensor, found: dict[Any, Tensor], captured: bool = False) -> None:
    """Leave results for the readers of z with it."""
    made: Any
    if type(z) is Lazy:
        made = Unread(z, found)
    else:
        made = Captured(z, found) if captured else Precomputed(z, found)
    z._flashnorm = made  # type: ignore[attr-defined]


def pop_precomputed(x: Any, reader: Any) -> Tensor | None:
    """What a norm has computed for this reader of its output, once."""
    made = getattr(x, "_flashnorm", None)
    if made is None or torch.is_grad_enabled() or not _may_take(reader):
        return None
    if type(made) is dict or not dispatch.same_as_before() or reader.unlike(x):
        return None
    found: Tensor | None = made.take(x, reader)
    return found


def _may_take(reader: Any) -> bool:
    """Whether a reader is what was recorded, and is called by the module as it was."""
    if reader.module.__dict__.get("forward") is not reader.installed or reader.watch.changed():
        return False
    return not reader.inner or reader.intact()


def leave_in_graph(z: Tensor, found: dict[Any, Tensor]) -> None:
    """`leave`, for a compiled graph."""
    z._flashnorm = found  # type: ignore[attr-defined]


def pop_in_graph(x: Any, reader: Any) -> Tensor | None:
    """`pop_precomputed`, for a compiled graph, which is made of what is seen while it is traced."""
    found = getattr(x, "_flashnorm", None)
    if type(found) is not dict or torch.is_grad_enabled() or reader.changed_in_graph():
        return None
    if reader.unlike(x) or reader.module._forward_pre_hooks:
        return None
    ready: Tensor | None = found.pop(reader, None)
    return ready


class Places:
    """Where modules are: in which module's dict, under which name."""

    def __init__(self, places: Sequence[tuple[dict[str, Any], str, nn.Module]]) -> None:
        owners = {id(owner): owner for owner, _, _ in places}
        self.expected = []
        for owner in owners.values():
            names = [name for other, name, _ in places if other is owner]
            found = [module for other, _, module in places if other is owner]
            pick = itemgetter(*names, names[0])  # of one name there is no tuple
            self.expected.append((owner, pick, (*found, found[0])))

    def hold(self) -> bool:
        """Whether every module is still where it was."""
        try:
            for owner, pick, expected in self.expected:
                if pick(owner) != expected:
                    return False
        except KeyError:
            return False
        return True


class Between:
    """The modules whose hooks run after a norm and before some of its readers, and the readers.

    `after` are called when the norm has returned, the norm first, `before` when a reader is going
    to be; `places` are (the modules of an owner, names, modules) of the readers.
    """

    def __init__(
        self,
        after: Sequence[nn.Module],
        before: Sequence[nn.Module],
        places: Sequence[tuple[dict[str, Any], str, nn.Module]],
    ) -> None:
        self.after, self.before = tuple(after), tuple(before)
        self.places = Places(places)

    def is_clear(self) -> bool:
        """Whether nobody listens and the readers are where they were.

        A hook could change the readers themselves; a reader that is gone asks for nothing.
        """
        return not self.is_heard() and self.places.hold()

    def is_heard(self) -> bool:
        """Whether there is a hook."""
        if forward_hooks_of_all or forward_pre_hooks_of_all:
            return True
        for module in self.after:  # not `any`: this is asked at every call
            if module._forward_hooks:
                return True
        for module in self.before:  # noqa: SIM110
            if module._forward_pre_hooks:
                return True
        return False
