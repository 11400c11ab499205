"""Where a fold reads from and writes to: directories, GGUF files, object stores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from flashnorm.checkpoint.gguf import dequantized, gguf_file
from flashnorm.checkpoint.mirror import mirrored, open_mirrored
from flashnorm.checkpoint.parts import Slot
from flashnorm.checkpoint.remote import Remote
from flashnorm.checkpoint.remote_work import check_remote_target, open_remote_work
from flashnorm.checkpoint.source import Source, open_source
from flashnorm.checkpoint.workdir import check_free, check_target, open_workdir
from flashnorm.errors import CheckpointError


class Work(Protocol):
    """A target that is being written: shards into their slots first, everything else afterwards."""

    def is_done(self, name: str, size: int) -> bool:
        """Whether an earlier run has finished the shard `name`."""

    def note(self, name: str) -> int:
        """The number with which the shard `name` was finished."""

    def slot(self, name: str) -> Slot:
        """Where the shard `name` is written, by any process."""

    def finish(self, name: str, size: int, note: int = 0) -> None:
        """Take the shard in the slot of `name` for done. Raises CheckpointError if it is not."""

    def copy(self, source: Path, name: str) -> None:
        """Copy a small file."""

    def write_json(self, name: str, value: Any) -> None:
        """Write an object."""

    def publish(self) -> None:
        """Make the target appear."""


def check_places(source: Path | Remote, target: Path | Remote) -> None:
    """Raise CheckpointError unless `target` is a new place outside of `source`."""
    if isinstance(target, Remote):
        check_remote_target(source, target)
    elif isinstance(source, Remote):
        check_free(target)
    else:
        check_target(source, target)


def open_work(
    target: Path | Remote, fingerprint: str, names: Collection[str]
) -> AbstractContextManager[Work]:
    """Open or resume the target, in which files of these `names` will be."""
    if isinstance(target, Remote):
        return open_remote_work(target, fingerprint, names)
    return open_workdir(target, fingerprint)


@dataclass(frozen=True)
class Opened:
    """A source: a directory of this machine with its small files, its name, and how it is read."""

    path: Path
    name: str
    read: Callable[[], Source]


@contextmanager
def opened(source: Path | Remote, target: Path | Remote) -> Iterator[Opened]:
    """Open a source for as long as it is folded. Raises CheckpointError where there is none."""
    if isinstance(source, Remote):
        with mirrored(source) as (path, objects):
            yield Opened(path, source.name, partial(open_mirrored, path, objects))
    elif file := gguf_file(source):
        if isinstance(target, Remote):
            raise CheckpointError(
                f"{file.name} is dequantized beside the target, which has to be on this machine: "
                "fold it into a directory"
            )
        with dequantized(file, target) as path:
            yield Opened(path, file.name, partial(open_source, path))
    else:
        yield Opened(source, source.name, partial(open_source, source))
