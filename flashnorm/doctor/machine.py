"""The processor, its caches, the cores and the memory that a process may use, threads and cards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from flashnorm.doctor.checks import Check, Row

SYSTEM = Path("/")  # tests lay out another one
MACHINE, THREADS, CARDS = "machine", "threads", "cards"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
_OPENMP = re.compile(r"lib(?:gomp|omp|iomp5|vcomp)[^/]*$")
_UNLIMITED = 2**60  # bytes: how old kernels write that a group has no limit


def _processor() -> Iterator[Row]:
    from flashnorm.kernels.cpu.crossovers import cpu_name

    yield Row(MACHINE, "processor", cpu_name())


def _caches() -> Iterator[Row]:
    place = SYSTEM / "sys/devices/system/cpu/cpu0/cache"
    found = []
    for index in sorted(place.glob("index*")):
        level, kind, size = (
            (index / name).read_text("utf-8").strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    yield Row(MACHINE, "caches", ", ".join(found) or "the system does not tell")


def _cores() -> Iterator[Row]:
    usable, limit = usable_cores(), core_limit()
    found = f"{os.cpu_count()} cores, {usable} of them for this process"
    if limit is not None:
        found += f", {limit:g} at a time by its control group"
    yield Row(MACHINE, "cores", found)


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_limit() -> float | None:
    """Cores that the control group of this process gives it; None without a limit."""
    for folder in _groups("cpu"):
        if (words := _words(folder / "cpu.max")) and words[0] != "max":
            return int(words[0]) / int(words[1])
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            return int(quota[0]) / int(period[0])
    return None


def _memory() -> Iterator[Row]:
    text = (SYSTEM / "proc/meminfo").read_text("utf-8")
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}
    found = f"{_gigabytes(sizes['MemTotal'])}, {_gigabytes(sizes['MemAvailable'])} of it free"
    if (limit := memory_limit()) is not None:
        found += f", at most {_gigabytes(limit)} by the control group"
    yield Row(MACHINE, "memory", found)


def memory_limit() -> int | None:
    """Bytes that the control group of this process gives it; None without a limit."""
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0] != "max" and int(words[0]) < _UNLIMITED:
                return int(words[0])
    return None


def _groups(controller: str) -> Iterator[Path]:
    """The control groups of this process from its own up to the root, of version 2 or 1."""
    file = SYSTEM / "proc/self/cgroup"
    if not file.exists():
        return
    root = SYSTEM / "sys/fs/cgroup"
    for line in file.read_text("utf-8").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = root / controller if names else root
        place = top / path.lstrip("/")
        while True:
            yield place
            if place == top or top not in place.parents:
                break
            place = place.parent


def _words(file: Path) -> list[str]:
    return file.read_text("utf-8").split() if file.is_file() else []


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _threads() -> Iterator[Row]:
    import torch

    count, cores = torch.get_num_threads(), core_limit() or usable_cores()
    said = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ]
    found = ", ".join([f"torch computes with {count}", *said])
    if count > cores:
        mend = f"export OMP_NUM_THREADS={max(1, int(cores))}"
        yield Row(THREADS, "torch", f"{found}: more than the cores it may use", "note", mend)
    else:
        yield Row(THREADS, "torch", found)


def _openmp() -> Iterator[Row]:
    import torch  # noqa: F401  # loads its runtime

    names = [line.rpartition(" ")[2] for line in _mapped()]
    found = sorted({Path(name).name for name in names if _OPENMP.search(name)})
    if not found:
        yield Row(THREADS, "OpenMP", "no runtime is loaded", "note")
    elif len(found) > 1:
        both = f"{' and '.join(found)} are loaded, and their threads fight for the cores"
        yield Row(THREADS, "OpenMP", both, "note", "keep one: unset LD_PRELOAD, reinstall torch")
    else:
        yield Row(THREADS, "OpenMP", found[0])


def _mapped() -> list[str]:
    return (SYSTEM / "proc/self/maps").read_text("utf-8").splitlines()


def _cards() -> Iterator[Row]:
    import torch

    driver = (SYSTEM / "proc/driver/nvidia/version").exists()
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is None:
            found = "there is a driver, but torch is built for the CPU alone"
            yield Row(CARDS, "NVIDIA", found, "missing", "pip install --force-reinstall torch")
        elif driver:
            yield Row(CARDS, "NVIDIA", "there is a driver, but torch cannot use it", "note")
        else:
            yield Row(CARDS, "NVIDIA", "no card")
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        what = f"{_gigabytes(about.total_memory)}, compute capability {about.major}.{about.minor}"
        yield Row(CARDS, f"NVIDIA {i}", f"{about.name}, {what}, CUDA {torch.version.cuda}")
    yield from _triton()


def _triton() -> Iterator[Row]:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        found = "not installed: calls on cards run on torch's own operations"
        yield Row(CARDS, "Triton", found, "missing", "pip install triton")
    else:
        import triton

        yield Row(CARDS, "Triton", triton.__version__)


CHECKS = (
    Check(MACHINE, "processor", _processor),
    Check(MACHINE, "caches", _caches),
    Check(MACHINE, "cores", _cores),
    Check(MACHINE, "memory", _memory),
    Check(THREADS, "torch", _threads),
    Check(THREADS, "OpenMP", _openmp),
    Check(CARDS, "NVIDIA", _cards),
)
