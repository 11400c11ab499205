"""Weights in huge pages: a stream of weights is not held up by one address translation per 4 KB.

Nothing is copied by us: Linux moves the memory under the same addresses (MADV_COLLAPSE, Linux 6.1).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator

from torch import Tensor

from flashnorm.kernels.backend import has_memory

HUGE = 2 << 20  # bytes of a huge page on x86 and, with 4 KB pages, on ARM
GAP = 4096  # what an allocator leaves between two tensors
COLLAPSE = 25  # MADV_COLLAPSE of <linux/mman.h>


def collapse(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory that lie in huge pages now; 0 where the system does not do it.

    Takes some seconds per GB, once. Memory that is a mapped file stays as it is, and so does that
    of tensors that are not plain ones with elements on the CPU.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(
        HUGE
        for begin, end in _spans(t for t in tensors if has_memory(t) and t.is_cpu)
        for page in range(-(-begin // HUGE) * HUGE, end - HUGE + 1, HUGE)
        if not madvise(page, HUGE, COLLAPSE)
    )


def _spans(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Stretches of memory that belong to the tensors, but for small gaps."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    begin = end = -GAP - 1
    for place, size in sorted(storages.items()):
        if place > end + GAP:
            yield begin, end
            begin = place
        end = max(end, place + size)
    yield begin, end
