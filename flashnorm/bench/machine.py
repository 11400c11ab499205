"""The machine that a figure was measured on, and how fast it reads memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

import flashnorm
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu.crossovers import cpu_name
from flashnorm.kernels.cpu.library import Library

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 64 * 2**20
LEAST_BUFFER = 256 * 2**20
PARTS = 8  # a rotating buffer is read in so many pieces
MOST_WEIGHTS = 2 * 2**30


def cache_bytes() -> int:
    """The largest cache of the first core, as Linux tells it; 64 MiB where it does not."""
    units = {"K": 2**10, "M": 2**20}
    found = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    sizes = [int(size[:-1]) * units[size[-1]] for size in found if size[-1:] in units]
    return max(sizes, default=UNKNOWN_CACHE)


def describe() -> dict[str, str | int]:
    """CPU, cores, threads, instruction set, versions and the date."""
    import transformers

    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return {
        "cpu": cpu_name(),
        "cores": sum(line.startswith("model name") for line in lines) or 1,
        "threads": torch.get_num_threads(),
        "kernels": cpu.available()[1],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flashnorm": flashnorm.__version__,
        "date": str(date.today()),
    }


def line(machine: dict[str, str | int]) -> str:
    """The machine in one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['kernels']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"flashnorm {machine['flashnorm']}, {machine['date']}"
    )


class Reader:
    """Reads a buffer in pieces, one a call, and returns the seconds per byte."""

    def __init__(self, library: Library, size: int, parts: int) -> None:
        self.buffer = torch.ones(size, dtype=torch.uint8)  # written, so that it has pages
        self.library, self.piece, self.parts, self.at = library, size // parts, parts, 0

    def __call__(self) -> float:
        self.at = (self.at + 1) % self.parts
        where = self.buffer.data_ptr() + self.at * self.piece
        start = time.perf_counter()
        self.library.read(where, self.piece, torch.get_num_threads())
        return (time.perf_counter() - start) / self.piece


def memory_reader(library: Library, cache: int) -> Callable[[], float]:
    """Reads what no cache holds: one piece of a buffer of twice the caches."""
    return Reader(library, max(2 * cache, LEAST_BUFFER), PARTS)


def weights_reader(library: Library, size: int) -> Callable[[], float]:
    """Reads `size` bytes that were read just before, as weights are for every token.

    A part of them is in the caches, where these are large. At most 2 GiB are read.
    """
    read = Reader(library, max(1, min(size, MOST_WEIGHTS)), 1)

    def twice() -> float:
        read()
        return read()

    return twice
