"""Where the bytes of a source's shards are: files of a directory, or objects of a store.

Whoever reads a shard asks its `Store`, which may be sent to another machine.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flashnorm.checkpoint.rawio import SHORTER, read_exact
from flashnorm.checkpoint.remote import CHUNK_BYTES, Facts, Remote
from flashnorm.checkpoint.spool import spool
from flashnorm.errors import CheckpointError

SMALL_BYTES = 1 << 20  # read at once; gains of an object store are kept, being read again and again


class Store(Protocol):
    """The shards of a source, by name."""

    def facts(self, name: str) -> Facts:
        """Size and version as they are now."""

    def span(self, name: str, start: int, length: int) -> tuple[bytearray | mmap.mmap, int]:
        """A writable buffer with these bytes, which no write carries back, and where they begin."""

    def equal(self, one: tuple[str, int], other: tuple[str, int], length: int) -> bool:
        """Whether two places, each a name and a start, hold the same bytes."""

    def on_disk(self, name: str, facts: Facts) -> AbstractContextManager[Path]:
        """The whole shard as a file. Raises CheckpointError unless its facts are these."""


@dataclass(frozen=True)
class Folder:
    """A directory that every process sees which is to read it."""

    path: Path

    def facts(self, name: str) -> Facts:
        stat = (self.path / name).stat()
        return stat.st_size, stat.st_mtime_ns

    def span(self, name: str, start: int, length: int) -> tuple[bytearray | mmap.mmap, int]:
        with open(self.path / name, "rb") as file:
            if length <= SMALL_BYTES:
                small = bytearray(length)
                read_exact(file.fileno(), memoryview(small), start)
                return small, 0
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if start + length > len(data):
            raise CheckpointError(SHORTER)
        return data, start

    def equal(self, one: tuple[str, int], other: tuple[str, int], length: int) -> bool:
        if not length:
            return True
        spans = (self.span(name, start, length) for name, start in (one, other))
        return torch.equal(*(_flat(data, first, length) for data, first in spans))

    @contextmanager
    def on_disk(self, name: str, facts: Facts) -> Iterator[Path]:
        try:
            found = self.facts(name)
        except FileNotFoundError:
            found = None
        _check_same(str(self.path / name), facts, found)
        yield self.path / name


@dataclass(frozen=True)
class Objects:
    """A directory of an object store, as it was when its files were `seen`."""

    remote: Remote
    seen: Mapping[str, Facts]

    def facts(self, name: str) -> Facts:
        return self.seen[name]

    def span(self, name: str, start: int, length: int) -> tuple[bytearray, int]:
        if length > SMALL_BYTES:
            return _read_same(self.remote, name, self.seen[name], start, length), 0
        return bytearray(_read_small(self.remote, name, self.seen[name], start, length)), 0

    def equal(self, one: tuple[str, int], other: tuple[str, int], length: int) -> bool:
        """In chunks, so that no large tensor is held."""
        for done in range(0, length, CHUNK_BYTES):
            count = min(CHUNK_BYTES, length - done)
            parts = [self.span(name, start + done, count)[0] for name, start in (one, other)]
            if parts[0] != parts[1]:
                return False
        return True

    @contextmanager
    def on_disk(self, name: str, facts: Facts) -> Iterator[Path]:
        where = f"{self.remote.url}/{name}"
        _check_same(where, facts, self.remote.facts(name))
        with spool(facts[0]) as directory:
            self.remote.download(name, facts[0], directory / name)
            _check_same(where, facts, self.remote.facts(name))
            yield directory / name


def _read_same(remote: Remote, name: str, facts: Facts, start: int, length: int) -> bytearray:
    """Bytes of an object of these facts. Raises CheckpointError where it has others now."""
    data = remote.read(name, start, length)
    _check_same(f"{remote.url}/{name}", facts, remote.facts(name))
    return data


@lru_cache(maxsize=1024)
def _read_small(remote: Remote, name: str, facts: Facts, start: int, length: int) -> bytes:
    return bytes(_read_same(remote, name, facts, start, length))


def _flat(data: bytearray | mmap.mmap, first: int, length: int) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8, count=length, offset=first)


def _check_same(where: str, planned: Facts, found: Facts | None) -> None:
    if found is None:
        raise CheckpointError(
            f"{where} cannot be seen from here: every machine needs the source under the same name"
        )
    if tuple(found) != tuple(planned):
        raise CheckpointError(
            f"{where} is not the file that the plan was made from: it changed meanwhile, or "
            "another file has its name on this machine"
        )
