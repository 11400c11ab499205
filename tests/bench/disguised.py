"""The GPU benchmark on a CPU that is taken for a GPU: `python -m tests.bench.disguised FOLDER`.

The device is called "cpu:0", which is not the "cpu" of a dry run, so that every line for a GPU runs
but those of torch.cuda, which are stood in for: a capture is a function that is called again, an
event is a time. Triton interprets the kernels, and torch.compile compiles nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import flashnorm
from benchmarks.gpu import timing, worker
from benchmarks.gpu.records import Settings

DEVICE = "cpu:0"
CARD = SimpleNamespace(
    name="Disguise", multi_processor_count=132, L2_cache_size=2**12, total_memory=2**30
)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def capture(warm: Callable[[], object], run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Called again instead of replayed; a result is written over where it lies, as by a graph."""
    warm()
    result = run()

    def replay() -> None:
        found = run()
        if isinstance(result, torch.Tensor):
            result.copy_(found)

    return replay, result


def disguise() -> None:
    timing.capture = capture
    timing.LONG = 0.0
    flashnorm.capture_ = lambda model: model
    torch.compile = lambda module, **options: module
    torch.ones = _on_the_cpu(torch.ones)
    for name, value in {
        "Event": Event,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1,
        "mem_get_info": lambda: (2**34, 2**34),
        "get_device_properties": lambda index: CARD,
        "get_device_capability": lambda: (9, 0),
        "device_of": lambda tensor: nullcontext(),
    }.items():
        setattr(torch.cuda, name, value)


def _on_the_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*size: Any, **options: Any) -> Any:
        return make(*size, **{k: v for k, v in options.items() if v != "cuda"})

    return made


def main(folder: str, *stages: str) -> int:
    disguise()
    settings = Settings(Path(folder), DEVICE, 600.0, rounds=1, dry=True, stages=stages)
    return worker.work(settings)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
