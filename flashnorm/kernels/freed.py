"""Memory that was freed, and that an allocator keeps."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def give_back() -> None:
    """Return freed memory to the system, where the allocator keeps it until told (glibc)."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):  # another allocator
            ctypes.CDLL(None).malloc_trim(0)
