"""Measure which way is fastest for a call on this card, when asked to, and remember it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashnorm.errors import FlashNormError
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import cached
from flashnorm.kernels.gpu.calls import run
from flashnorm.kernels.gpu.launch import MOST_ROWS, device_of
from flashnorm.kernels.gpu.ways import why_not
from flashnorm.kernels.weights import packed

Timer = Callable[[Callable[[], object]], float]


def measure(calls: Sequence[Call], timer: Timer | None = None) -> cached.Entry:
    """Time every way of one call, store the fastest in the cache file, and return it.

    calls: the same call on copies of its weights, in all larger than the card's second cache, which
    otherwise would be measured. timer: milliseconds of a function; by default the median of CUDA
    graphs. Raises FlashNormError for a call that the kernels do not take.
    """
    call = calls[0]
    if reason := why_not(call):
        raise FlashNormError(f"this call cannot be measured on a GPU: {reason}")
    times = {way: 1e3 * (timer or _graphed)(_runner(calls, way)) for way in _ways(call)}
    best = min(times, key=lambda way: times[way])
    note = ", ".join(f"{way} {value / len(calls):.2f} µs" for way, value in times.items())
    entry = cached.Entry(best, note)
    cached.store(device_of(call.x), {cached.key_of(call): entry})
    return entry


def _ways(call: Call) -> list[str]:
    if packed(call.weights):
        return ["skinny"]
    few = call.x.numel() <= MOST_ROWS * call.x.shape[-1]
    return ["skinny", "gemm", "matmul"] if few else ["gemm", "matmul"]


def _runner(calls: Sequence[Call], way: str) -> Callable[[], list[list[Tensor]]]:
    """All calls once, one after the other."""
    return lambda: [run(call, way) for call in calls]


def _graphed(function: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    with torch.no_grad():
        return do_bench_cudagraph(function, return_mode="median")
