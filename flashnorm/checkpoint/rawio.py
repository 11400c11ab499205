"""Bytes between files: exact reads and writes, and copies that stay inside the kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from io import FileIO

from flashnorm.errors import CheckpointError

COPY_BYTES = 16 << 20
# What a kernel or a file system answers that cannot copy between two files by itself.
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}

Report = Callable[[int], None]


def read_exact(reader: FileIO, view: memoryview, start: int) -> None:
    """Fill `view` with the bytes of the file from `start` on."""
    reader.seek(start)
    done = 0
    while done < len(view):
        count = reader.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{reader.name} became shorter while it was being read")
        done += count


def write_all(writer: FileIO, view: memoryview) -> None:
    """Write all of `view` at the writer's position."""
    done = 0
    while done < len(view):
        done += writer.write(view[done:])


def copy_range(reader: FileIO, writer: FileIO, start: int, length: int, report: Report) -> None:
    """Append `length` bytes from `start` on to the writer, through the kernel where it can."""
    done = 0
    while done < length:
        count = _kernel_copy(reader, writer, start + done, min(COPY_BYTES, length - done))
        if not count:
            return _copy_through_memory(reader, writer, start + done, length - done, report)
        done += count
        report(count)


def _kernel_copy(reader: FileIO, writer: FileIO, start: int, length: int) -> int:
    """Bytes copied; 0 where this has to be done another way."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(reader.fileno(), writer.fileno(), length, offset_src=start)
    except OSError as error:
        if error.errno in NO_KERNEL_COPY:
            return 0
        raise


def _copy_through_memory(
    reader: FileIO, writer: FileIO, start: int, length: int, report: Report
) -> None:
    buffer = memoryview(bytearray(min(COPY_BYTES, length)))
    for position in range(start, start + length, len(buffer)):
        view = buffer[: start + length - position]
        read_exact(reader, view, position)
        write_all(writer, view)
        report(len(view))
