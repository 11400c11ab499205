"""The head of a GGUF file: its architecture, and where its tensors lie. Source: ggml's gguf.md.

Long lists, as those of a vocabulary, are passed over and not read.
"""

from __future__ import annotations

import mmap
import os
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from flashnorm.reading import open_regular

VERSIONS = (2, 3)
# Numbers of metadata by their code; 8 is a string, 9 a list.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
_STRING, _LIST = 8, 9
_LARGEST = 1 << 48  # no size is beyond: what says so is damaged
_LONGEST = 1 << 26  # bytes of a string; templates of chats are the longest
_MOST = 1 << 24  # entries of a list; vocabularies are the longest
_MOST_PARTS = 100_000  # layers, experts, heads: transformers makes lists of as many


class Entry(NamedTuple):
    """A tensor: its shape in torch's order, the number of its type, its place behind the head."""

    name: str
    shape: tuple[int, ...]
    type: int
    place: int


class Header(NamedTuple):
    architecture: str
    entries: tuple[Entry, ...]
    end: int  # where the first tensor may lie


def read(path: Path) -> Header:
    """Raises ValueError where it is no such head, struct.error where it ends too early."""
    with open_regular(path) as opened:
        if not os.fstat(opened.fileno()).st_size:
            raise ValueError("it is empty")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
            return _Reader(held).header()


class _Reader:
    def __init__(self, held: mmap.mmap) -> None:
        self.held, self.place = held, 0

    def header(self) -> Header:
        magic, version, tensors, pairs = self._take("4sIQQ")
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if version not in VERSIONS:
            other = version >> 24 in VERSIONS and not version & 0xFFFF
            raise ValueError("its bytes are in the other order" if other else f"version {version}")
        if max(tensors, pairs) > _MOST:
            raise ValueError(f"it counts {tensors} tensors and {pairs} pairs of metadata")
        told = dict(self._pair() for _ in range(pairs))
        entries = tuple(self._entry() for _ in range(tensors))
        step, architecture = told.get("general.alignment", 32), told.get("general.architecture")
        if not isinstance(architecture, str):
            raise ValueError("it does not say its general.architecture")
        for key, value in told.items():
            is_count = key.startswith(f"{architecture}.") and key.endswith("_count")
            if is_count and isinstance(value, (int, float)) and value > _MOST_PARTS:
                raise ValueError(f"{key} is {value}")
        if not isinstance(step, int) or step <= 0 or step & (step - 1):
            raise ValueError(f"general.alignment is {step}")
        if len({entry.name for entry in entries}) < len(entries):
            raise ValueError("two tensors have one name")
        return Header(architecture, entries, -(-self.place // step) * step)

    def _take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.held, self.place)
        self.place += struct.calcsize(f"<{form}")
        return found

    def _skip(self, size: int) -> None:
        self.place += size
        if self.place > len(self.held):
            raise struct.error("the file ends in its head")

    def _string(self) -> str:
        (size,) = self._take("Q")
        if size > _LONGEST:
            raise ValueError(f"a text of {size} bytes")
        first = self.place
        self._skip(size)
        return self.held[first : self.place].decode("utf-8")

    def _pair(self) -> tuple[str, Any]:
        key = self._string()
        (code,) = self._take("I")
        return key, self._value(code)

    def _value(self, code: int) -> Any:
        """A number or a string; None for a list, which is passed over."""
        if code in _NUMBERS:
            return self._take(_NUMBERS[code])[0]
        if code == _STRING:
            return self._string()
        if code != _LIST:
            raise ValueError(f"there is no kind {code} of values")
        inner, count = self._take("IQ")
        if count > _MOST:
            raise ValueError(f"a list of {count} values")
        if inner in _NUMBERS:
            self._skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
            return None
        if inner != _STRING:
            raise ValueError(f"there are no lists of kind {inner} of values")
        for _ in range(count):
            self._skip(self._take("Q")[0])
        return None

    def _entry(self) -> Entry:
        name = self._string()
        (dimensions,) = self._take("I")
        if not 0 < dimensions <= 8:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed(self._take(f"{dimensions}Q")))
        kind, place = self._take("IQ")
        if prod(shape) >= _LARGEST or place >= _LARGEST:
            raise ValueError(f"{name} is {list(shape)} at {place}")
        return Entry(name, shape, kind, place)
