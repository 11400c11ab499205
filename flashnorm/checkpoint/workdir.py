"""The directory beside the target in which a checkpoint is written, and its journal.

A shard is finished when it has its final name: it is written in a directory of its own, by any
process, synced, then renamed by the one that holds the lock. A killed run leaves the directory; the
next run with the same fingerprint goes on after the finished shards, any other starts over. The
last step renames the directory to the target.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.files import copy_file
from flashnorm.checkpoint.parts import FileSlot
from flashnorm.errors import CheckpointError
from flashnorm.reading import read_json

JOURNAL = ".flashnorm-journal.json"
PARTS = ".flashnorm-parts"  # where shards lie until this process gives them their names
PARTIAL_SUFFIX = ".flashnorm-partial"
LOCK_SUFFIX = ".lock"
ATTEMPTS = 5


def partial_path(target: Path) -> Path:
    """Where `target` is written until it is complete."""
    return target.parent / f".{target.name}{PARTIAL_SUFFIX}"


def own_directory(path: Path) -> None:
    """Make the directory, or take one that an earlier run of this user has left there.

    Raises CheckpointError for a link or anything else of that name, and for another user's: what is
    in it would be emptied, or come into the result. And where it cannot be made.
    """
    try:
        with suppress(FileExistsError):
            path.mkdir()
        found = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path} could not be made: {error}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise CheckpointError(f"{path} is in the way, and no directory: look at it and remove it")
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise CheckpointError(
            f"{path} belongs to another user: choose a target in a directory of your own"
        )


def check_target(source: Path, target: Path) -> None:
    """Raise CheckpointError unless `target` is a new name outside of the directory `source`."""
    real_source, real_target = (Path(os.path.realpath(path)) for path in (source, target))
    if real_target == real_source:
        raise CheckpointError(f"{target} is the source itself: a fold never overwrites its source")
    if real_target.is_relative_to(real_source):
        raise CheckpointError(f"{target} lies inside of the source {source}: choose another place")
    check_free(target)


def check_free(target: Path) -> None:
    """Raise CheckpointError unless `target` is a new name in a directory that there is."""
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already: remove it or choose another name")
    if not target.parent.is_dir():
        raise CheckpointError(f"the directory {target.parent} for {target.name} does not exist")


class Workdir:
    """An open work directory; made by `open_workdir`."""

    def __init__(self, target: Path, fingerprint: str) -> None:
        self.target = target
        self.path = partial_path(target)
        self._journal: dict[str, Any] = {"fingerprint": fingerprint, "notes": {}}

    def begin(self) -> None:
        """Keep the finished shards of a killed run with the same fingerprint, else start over."""
        found = self._read_journal()
        if found is not None:
            self._journal = found
        else:
            for file in self.path.iterdir():
                is_folder = file.is_dir() and not file.is_symlink()
                shutil.rmtree(file) if is_folder else file.unlink()
        self._write_journal()  # also where found: it replaces a .tmp that a kill may have left
        self._remove_parts()
        (self.path / PARTS).mkdir()

    def is_done(self, name: str, size: int) -> bool:
        """Whether a shard was finished by an earlier run."""
        file = self.path / name
        return file.is_file() and not file.is_symlink() and file.stat().st_size == size

    def note(self, name: str) -> int:
        """The number recorded when the shard `name` was finished."""
        return int(self._journal["notes"].get(name, 0))

    def slot(self, name: str) -> FileSlot:
        """Where the shard `name` is written."""
        return FileSlot(self.path / PARTS / name)

    def finish(self, name: str, size: int, note: int = 0) -> None:
        """Give the synced shard in the slot of `name` its final name."""
        part = self.slot(name).path
        if not part.is_file() or part.stat().st_size != size:
            raise CheckpointError(f"{part} was written, but is not to be seen from this machine")
        if note:
            self._journal["notes"][name] = note
            self._write_journal()
        os.replace(part, self.path / name)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file that is no shard."""
        copy_file(source, self.path / name)

    def temporary(self, name: str) -> Path:
        return self.path / f"{name}.tmp"

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        with open(self.temporary(name), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.temporary(name), self.path / name)

    def publish(self) -> None:
        """Rename the complete directory to the target."""
        self._remove_parts()
        (self.path / JOURNAL).unlink()
        sync_directory(self.path)
        if os.path.lexists(self.target):
            raise CheckpointError(f"{self.target} appeared while it was being written: remove it")
        os.rename(self.path, self.target)
        sync_directory(self.target.parent)

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            found = read_json(self.path / JOURNAL)
            same = found["fingerprint"] == self._journal["fingerprint"]
            notes = found["notes"]
            whole = all(type(note) is int for note in notes.values())
            return {"fingerprint": found["fingerprint"], "notes": notes} if same and whole else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _remove_parts(self) -> None:
        """Again while a worker that counts as lost still writes; it finds no directory then."""
        for _ in range(ATTEMPTS):
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
            if not (self.path / PARTS).exists():
                return
        raise CheckpointError(
            f"{self.path / PARTS} cannot be removed: another process writes there"
        )

    def _write_journal(self) -> None:
        self.write_json(JOURNAL, self._journal)


@contextmanager
def open_workdir(target: Path, fingerprint: str) -> Iterator[Workdir]:
    """Open or resume the work directory of `target`.

    An error removes it, so that nothing half-written stays; an interrupt (KeyboardInterrupt, or a
    signal that ends the process) leaves it for the next run.
    """
    work = Workdir(target, fingerprint)
    with _locked(work.path):
        own_directory(work.path)
        try:
            work.begin()
            yield work
        except Exception:
            shutil.rmtree(work.path, ignore_errors=True)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep a second run out of `path`; the system ends the lock of a process that is killed.

    The lock's file lies beside the directory: Windows renames none in which a file is open.
    """
    from filelock import FileLock, Timeout

    file = path.with_name(path.name + LOCK_SUFFIX)
    if file.is_symlink():
        raise CheckpointError(f"{file} is a link, which flashnorm never makes: remove it")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another process is writing {path}: wait for it to end") from None
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held; Windows lets it be removed afterwards only
            os.unlink(lock.lock_file)
        lock.release()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
