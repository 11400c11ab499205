"""The card and what it can do: read bandwidth and matmul rate, measured before all else."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.records import CEILINGS, Piece, Run
from benchmarks.gpu.timing import in_turn, per_call
from flashnorm.bench import machine

# All of them are read and none is set.
ASKED = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
)
L2_UNKNOWN = 50 * 2**20


def pieces(run: Run) -> Iterator[Piece]:
    yield Piece(CEILINGS, {}, 8.0, lambda: ceilings(run.settings.device, run.settings.dry))


def describe(device: str) -> dict[str, Any]:
    """Card, clocks, versions and the date."""
    found: dict[str, Any] = {**machine.describe(), "triton": _version("triton")}
    if device == "cpu":
        return {**found, "card": "cpu dry run"}
    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "card": properties.name,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": l2_bytes(device),
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "clocks": clocks(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first card; nothing where it is not there."""
    try:
        command = ["nvidia-smi", "--id=0", f"--query-gpu={ASKED}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in said.stdout.strip().split(",")]
    return dict(zip(ASKED.split(","), values, strict=False))


def l2_bytes(device: str) -> int:
    if device == "cpu":
        return 0
    properties = torch.cuda.get_device_properties(0)
    return int(getattr(properties, "L2_cache_size", 0) or L2_UNKNOWN)


def ceilings(device: str, dry: bool) -> dict[str, float]:
    """Bytes per second of the faster of two streams, and operations per second of a matmul.

    A sum reads a gigabyte; a copy of one reads and writes it, and both count.
    """
    size, side = (2**16, 64) if dry else (2**30, 8192)
    stream = torch.randn(size // 2, device=device).to(torch.bfloat16)
    target = torch.empty_like(stream)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    runs: dict[str, Callable[[], float]] = {
        "sum": per_call(lambda i: stream.sum(), 1, device),
        "copy": per_call(lambda i: target.copy_(stream), 1, device),
        "matmul": per_call(lambda i: a @ b, 1, device),
    }
    timings, errors = in_turn(runs, 7)
    if errors:
        raise RuntimeError(f"the ceilings of this card could not be measured: {errors}")
    read, copied = size / timings["sum"].median, 2 * size / timings["copy"].median
    return {
        "bytes": max(read, copied),
        "read_bytes": read,
        "copied_bytes": copied,
        "operations": 2 * side**3 / timings["matmul"].median,
    }
