"""Room on this machine's own disk for a shard on its way from or to an object store."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flashnorm.errors import CheckpointError

PREFIX = "flashnorm-spool-"
LOCK = ".lock"
YOUNG = 60.0  # seconds in which a directory may be without its lock


@contextmanager
def spool(size: int) -> Iterator[Path]:
    """A directory for a file of `size` bytes, in the system's place for temporary ones (TMPDIR).

    It goes with its process: the next one removes what a killed one has left. Raises
    CheckpointError where the disk has not that much room.
    """
    from filelock import FileLock

    place = Path(tempfile.gettempdir())
    _sweep(place)
    free = shutil.disk_usage(place).free
    if size > free:
        raise CheckpointError(
            f"{size} bytes are needed in {place} for a shard on its way, {free} are free: make "
            "room, or set TMPDIR to a larger disk"
        )
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    lock = FileLock(directory / LOCK)
    try:
        with suppress(OSError, NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
        yield directory
    finally:
        lock.release()
        shutil.rmtree(directory, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove what belongs to nobody any more: the system ends the lock of a killed process."""
    from filelock import FileLock, Timeout

    for directory in place.glob(f"{PREFIX}*"):
        with suppress(OSError, NotImplementedError, Timeout):
            if time.time() - directory.stat().st_mtime < YOUNG:
                continue
            lock = FileLock(directory / LOCK)
            with lock.acquire(timeout=0):
                shutil.rmtree(directory, ignore_errors=True)
