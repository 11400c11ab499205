"""Bytes that a piece of work needs at its peak, beyond what was there before it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashnorm.bench.memory import peak_allocated


def peak(run: Callable[[], object], device: str) -> int:
    """As torch's allocator counts them, to the byte."""
    if device == "cpu":
        return peak_allocated(run)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
