"""What nobody needs any more: memory that Python or an allocator keeps, and threads that wait."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

from flashnorm.kernels.openmp import end_threads


def give_back() -> None:
    """Return to the system: memory of cycles, what the allocator keeps (glibc), OpenMP threads."""
    end_threads()
    gc.collect()
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):  # another allocator
            ctypes.CDLL(None).malloc_trim(0)
