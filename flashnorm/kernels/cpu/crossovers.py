"""At how many rows of x the next way to multiply is faster: shipped, or measured on this machine.

    rows as they come | from `packed` rows on in packed panels | above `library` rows torch's matmul

What was measured is a JSON file, read once; `flashnorm tune` writes it:

    {"version": 1, "machines": {machine: {isa: {"bfloat16 narrow": {"packed": 16, "library": 512,
    "note": ".."}}}}}

It is FLASHNORM_CPU_CACHE, or flashnorm/cpu.json in the user's cache folder; FLASHNORM_CPU_CACHE=off
leaves what is shipped.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flashnorm.kernels import measurements
from flashnorm.kernels.weights import DTYPES

VERSION = 1
NEVER = 2**40  # rows
FEW = 16
CACHE, FILE = "FLASHNORM_CPU_CACHE", "cpu.json"
NARROW = 1024  # features: less is one shape class, as many and more another (WIDE in library.cpp)
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Crossover:
    """packed: rows from which x is packed, 0 for the library's own; library: rows above which
    torch's matmul is faster; note: what was measured, in words."""

    packed: int
    library: int
    note: str = "shipped"


def find(isa: str, dtype: torch.dtype, n: int) -> Crossover:
    """Of an instruction set, for x [rows, n] and weights of one dtype."""
    held = _loaded()  # empty on most machines, and asked for at every call of a function
    row = measured().get(isa, {}).get(key(dtype, n)) if held else None
    return row or shipped(isa, dtype)


def apply(library: Any) -> None:
    """Let a library pack rows as was measured on its instruction set, or as it does by itself."""
    for dtype, number in DTYPES.items():
        for wide, n in enumerate((1, NARROW)):
            library.set_panel_rows(number, wide, find(library.isa, dtype, n).packed)


def key(dtype: torch.dtype, n: int) -> str:
    return f"{str(dtype).removeprefix('torch.')} {'narrow' if n < NARROW else 'wide'}"


@cache
def shipped(isa: str, dtype: torch.dtype) -> Crossover:
    """By instruction set and maker, where nothing was measured on the machine itself.

    Measured on a Zen 4 (all of x86 below AMX, forced) and on a Xeon with AMX; NEON is not measured.
    """
    amd = cpu_name().startswith("AMD")
    if isa == "amx":
        return Crossover(0, 128 if dtype == torch.bfloat16 else FEW)
    if isa not in ("avx2", "avx512", "avx512vnni", "avx512bf16"):
        return Crossover(0, FEW)
    fast = dtype == torch.float32 or (dtype == torch.bfloat16 and isa == "avx512bf16")
    return Crossover(0, NEVER if amd or not fast else FEW)  # torch is slow in the others


@cache
def cpu_name() -> str:
    """As the processor calls itself."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def machine() -> str:
    """What measurements hold for: the processor, how many threads torch has, and its version."""
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measured() -> dict[str, dict[str, Crossover]]:
    """By instruction set and `key`, what was measured on this machine."""
    return _loaded().get(machine(), {})


def forget() -> None:
    """Read the file again."""
    _loaded.cache_clear()


@cache
def _loaded() -> dict[str, dict[str, dict[str, Crossover]]]:
    return measurements.read(measurements.path(CACHE, FILE), VERSION, _parse)


def _parse(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Crossover]]]:
    return {
        name: {isa: {k: _entry(v) for k, v in rows.items()} for isa, rows in isas.items()}
        for name, isas in found["machines"].items()
    }


def _entry(value: dict[str, Any]) -> Crossover:
    packed, library = value["packed"], value["library"]
    if not all(type(rows) is int and 0 <= rows <= NEVER for rows in (packed, library)):
        raise ValueError(f"no numbers of rows: {packed!r}, {library!r}")
    return Crossover(packed, library, str(value["note"]))


def store(isa: str, found: dict[str, Crossover]) -> Path | None:
    """Write measurements into the file, in place of older ones; None where it is switched off."""
    file = measurements.path(CACHE, FILE)
    if file is None:
        return None
    held = measurements.read(file, VERSION, _parse)
    machines = {name: dict(isas) for name, isas in held.items()}
    mine = machines.setdefault(machine(), {})
    mine[isa] = {**mine.get(isa, {}), **found}
    whole = {
        name: {isa: {k: asdict(v) for k, v in rows.items()} for isa, rows in isas.items()}
        for name, isas in machines.items()
    }
    measurements.write(file, {"version": VERSION, "machines": whole})
    forget()
    return file
