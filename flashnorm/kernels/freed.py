"""Memory that nobody holds any more, and that Python or an allocator keeps."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress


def give_back() -> None:
    """Return memory to the system: that of cycles, and what the allocator keeps (glibc)."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):  # another allocator
            ctypes.CDLL(None).malloc_trim(0)
