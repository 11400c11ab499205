"""The job of a fold: one shard, from its store to its slot, in any process."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashnorm.checkpoint.layout import Shard
from flashnorm.checkpoint.remote import Facts, Remote
from flashnorm.checkpoint.spool import spool
from flashnorm.checkpoint.store import Store
from flashnorm.checkpoint.stream import Report, write_shard
from flashnorm.checkpoint.values import Values
from flashnorm.errors import CheckpointError


class Slot(Protocol):
    """Where one shard goes to. What is there is complete, whoever else writes it too."""

    def filling(self, size: int, report: Report) -> AbstractContextManager[tuple[Path, Report]]:
        """A new file to write, of `size` bytes, and to whom to tell what is written."""


@dataclass(frozen=True)
class FileSlot:
    """A file of a directory that every process sees which is to write it."""

    path: Path

    @contextmanager
    def filling(self, size: int, report: Report) -> Iterator[tuple[Path, Report]]:
        temporary = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.tmp")
        if not self.path.parent.is_dir():
            raise CheckpointError(
                f"{self.path.parent} cannot be seen from here: every machine needs the target's "
                "directory under the same name"
            )
        try:
            yield temporary, report
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, self.path)


@dataclass(frozen=True)
class ObjectSlot:
    """An object of a store, uploaded from a file on this machine's disk."""

    remote: Remote
    name: str

    @contextmanager
    def filling(self, size: int, report: Report) -> Iterator[tuple[Path, Report]]:
        with spool(size) as directory:
            path = directory / self.name
            yield path, _untold
            self.remote.upload(path, self.name, report)


def _untold(count: int) -> None:
    """Bytes count when they have arrived."""


@dataclass(frozen=True)
class Part:
    """One shard to write. `facts` are those of its source when the plan was made."""

    shard: Shard
    source: Store
    facts: Facts
    slot: Slot

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def nbytes(self) -> int:
        return self.shard.header.file_bytes

    def run(self, values: Values, report: Report) -> int:
        """Write the shard; returns how many elements became subnormal.

        Raises CheckpointError where the source is not what was planned with, or a place is not
        seen from here; FoldError where the dtype overflows.
        """
        with (
            self.slot.filling(self.nbytes, report) as (target, told),
            self.source.on_disk(self.name, self.facts) as source,
        ):
            return write_shard(source, target, self.shard, values, told)
