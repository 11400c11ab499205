"""What a norm computes before its readers ask, and when a reader may take it.

Nothing that can happen to a tensor is forbidden between a norm and its reader: not everything that
writes leaves a trace (`x.data`, `x.numpy()`, a swap of the memory). So a reader takes a result only
where the values that it is given are, bit for bit, those that the result was computed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_char
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

# Bytes that are compared as a text, which takes the least of Python; more are compared by torch.
AS_TEXT = 1 << 15
# Compared as whole numbers, so that a NaN is what it was and -0 is not 0.
NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _memory(size: int) -> Any:
    """So many bytes of memory, as ctypes knows it."""
    return c_char * size


class Ahead:
    """Results for the readers of a tensor, and the values that they were computed from."""

    __slots__ = ("bits", "copy", "dtype", "found", "memory", "place", "shape")

    def __init__(self, z: Tensor, found: dict[Any, Tensor]) -> None:
        self.found, self.dtype, self.shape = found, z.dtype, z.shape
        self.place, size = z.data_ptr(), z.nbytes
        self.bits, self.copy = b"", None
        if size <= AS_TEXT:
            self.memory = _memory(size).from_address(self.place)
            self.bits = self.memory.raw
        else:
            self.copy = z.view(NUMBERS[z.element_size()]).clone()

    def take(self, x: Tensor, reader: Any) -> Tensor | None:
        """The reader's result, once, if x holds what it was computed from."""
        if x.dtype is not self.dtype or x.shape != self.shape or not x.is_contiguous():
            return None
        if x.data_ptr() != self.place:  # which may be that of a tensor that is gone by now
            return None
        if self.copy is None:
            same = self.memory.raw == self.bits
        else:
            same = torch.equal(x.view(self.copy.dtype), self.copy)
        return self.found.pop(reader, None) if same else None


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
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return True
        for module in self.after:  # not `any`: this is asked at every call
            if module._forward_hooks:
                return True
        for module in self.before:  # noqa: SIM110
            if module._forward_pre_hooks:
                return True
        return False
