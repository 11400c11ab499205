"""Bytes between files at given offsets: exact reads and writes, and copies inside the kernel.

Every function names its offsets, so that several threads can work on one pair of files.
"""

from __future__ import annotations

import errno
import os

from flashnorm.errors import CheckpointError

COPY_BYTES = 8 << 20
# What a kernel or a file system answers that cannot copy between two files by itself.
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def read_exact(reader: int, view: memoryview, start: int) -> None:
    """Fill `view` with the bytes of the file from `start` on."""
    done = 0
    while done < len(view):
        count = os.preadv(reader, [view[done:]], start + done)
        if not count:
            raise CheckpointError("the source became shorter while it was being read")
        done += count


def write_exact(writer: int, view: memoryview, start: int) -> None:
    """Write all of `view` to the file from `start` on."""
    done = 0
    while done < len(view):
        done += os.pwrite(writer, view[done:], start + done)


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


def start_writeback(writer: int, start: int, length: int) -> None:
    """Ask the system to begin writing these bytes to disk, so that the last sync is short.

    On Linux this also drops the pages that are on disk already, which keeps the cache of a large
    model from crowding out everything else.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(writer, start, length, os.POSIX_FADV_DONTNEED)
