"""Bytes between files at given offsets: exact reads and writes, and copies inside the kernel.

Every function names its offsets, so that several threads can work on one pair of files.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashnorm.errors import CheckpointError

COPY_BYTES = 8 << 20
SHORTER = "the source became shorter while it was being read"
# What a kernel or a file system answers that cannot copy between two files by itself.
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}

_held = threading.local()


def scratch(use: str, nbytes: int) -> memoryview:
    """Memory of this thread for one use, which is taken again by the next call for the same use.

    Reading into fresh memory takes twice as long: the system has to clear its pages first.
    """
    held: dict[str, bytearray] = _held.__dict__
    if len(held.get(use, b"")) < nbytes:
        held[use] = bytearray(nbytes)
    return memoryview(held[use])[:nbytes]


def read_exact(reader: int, view: memoryview, start: int) -> None:
    """Fill `view` with the bytes of the file from `start` on."""
    done = 0
    while done < len(view):
        count = os.preadv(reader, [view[done:]], start + done)
        if not count:
            raise CheckpointError(SHORTER)
        done += count


def write_exact(writer: int, view: memoryview, start: int) -> None:
    """Write all of `view` to the file from `start` on."""
    done = 0
    while done < len(view):
        done += os.pwrite(writer, view[done:], start + done)


@contextmanager
def unchanged(path: Path, reader: int, beginning: bytes) -> Iterator[None]:
    """Raise CheckpointError where the file `path`, open as `reader`, does not begin so, or is
    another one afterwards."""
    before = _identity(os.fstat(reader))
    if os.pread(reader, len(beginning), 0) != beginning:
        raise _changed(path)
    try:
        yield
    except Exception:
        _check_unchanged(path, before)  # what explains the error, if it is so
        raise
    _check_unchanged(path, before)


def _check_unchanged(path: Path, before: tuple[int, ...]) -> None:
    try:
        now = _identity(os.stat(path))
    except OSError:  # it is gone
        now = ()
    if now != before:
        raise _changed(path)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was being read: wait until nothing writes to it, and start again"
    )


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def copy_exact(reader: int, writer: int, start: int, length: int, target: int) -> None:
    """Copy `length` bytes from `start` of one file to `target` of the other."""
    done = 0
    while done < length:
        count = _kernel_copy(reader, writer, start + done, length - done, target + done)
        if not count:
            break
        done += count
    if done < length:
        view = memoryview(bytearray(length - done))
        read_exact(reader, view, start + done)
        write_exact(writer, view, target + done)


def _kernel_copy(reader: int, writer: int, start: int, length: int, target: int) -> int:
    """Bytes copied; 0 where this has to be done another way."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(reader, writer, length, start, target)
    except OSError as error:
        if error.errno in NO_KERNEL_COPY:
            return 0
        raise


def expect_sequential(reader: int) -> None:
    """Tell the system that the file will be read once from front to back."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_SEQUENTIAL)


class Prefetch:
    """Asks the system for the bytes of a file before they are read, a window ahead.

    A disk is fastest with many requests at once; threads that read blocks of one file in turn look
    to the system like one that jumps, for whom it fetches little ahead.
    """

    WINDOW = 64 << 20

    def __init__(self, reader: int) -> None:
        self.reader, self.asked = reader, 0

    def upto(self, position: int) -> None:
        """Reading has come to `position`."""
        if hasattr(os, "posix_fadvise") and position + self.WINDOW // 2 > self.asked:
            start = max(position, self.asked)
            os.posix_fadvise(self.reader, start, self.WINDOW, os.POSIX_FADV_WILLNEED)
            self.asked = start + self.WINDOW


def start_writeback(writer: int, start: int, length: int) -> None:
    """Ask the system to begin writing these bytes to disk, so that the last sync is short.

    On Linux this also drops the pages that are on disk already, which keeps the cache of a large
    model from crowding out everything else.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(writer, start, length, os.POSIX_FADV_DONTNEED)
