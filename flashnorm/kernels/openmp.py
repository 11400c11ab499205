"""The OpenMP runtime that torch has loaded, by the symbols that torch's own library finds."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

# Windows looks a name up in one library alone, so that the runtime's own is named there as well.
LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll", "libiomp5md.dll")
SOFT = 1  # omp_pause_soft: what the runtime was told stays as it is


def torch_symbols(*names: str) -> list[ctypes.c_void_p] | None:
    """Functions of torch's own library or of what it has loaded; None if one is missing."""
    for library in LIBRARIES:
        try:
            found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library))
            return [ctypes.cast(getattr(found, name), ctypes.c_void_p) for name in names]
        except (OSError, AttributeError):
            continue
    return None


@cache
def pause() -> ctypes.c_void_p | None:
    """What ends the caller's OpenMP threads, where the runtime is GNU's; others keep theirs."""
    if torch_symbols("__kmpc_fork_call"):
        return None
    found = torch_symbols("omp_pause_resource_all")
    return found[0] if found else None


def end_threads() -> None:
    """End the OpenMP threads that the calling thread has; its next parallel loop starts new ones.

    GNU's runtime counts the threads of all callers. Where they are more than the cores it lets them
    sleep after every loop, so that a server that loads a model in one thread and runs it in another
    waits for them again and again: a token of SmolLM2 took 46 ms instead of 34.
    """
    if (function := pause()) is not None and function.value is not None:
        ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(function.value)(SOFT)
