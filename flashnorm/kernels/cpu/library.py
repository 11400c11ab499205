"""The compiled library: found, checked and loaded once, with torch's OpenMP threads.

FLASHNORM_CPU_LIBRARY names another file than the installed one: a build with sanitizers, say.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from flashnorm.errors import FlashNormError
from flashnorm.kernels.cpu import crossovers
from flashnorm.kernels.openmp import pause, torch_symbols

NAME = "_cpu.dll" if os.name == "nt" else "_cpu.so"
PATH = Path(os.environ.get("FLASHNORM_CPU_LIBRARY") or Path(__file__).with_name(NAME))
ABI = 9  # FLASHNORM_ABI in csrc/api.h
COMPILERS = "clang-cl" if os.name == "nt" else "g++ or clang++"
REBUILD = f"reinstall flashnorm with a C++17 compiler ({COMPILERS}) to have them"

# Of an OpenMP runtime: who a thread is, and what starts threads where GNU's entry point is missing.
NUMBERS = ("omp_get_thread_num", "omp_get_num_threads")
KMPC = ("__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num")

_choosing = threading.RLock()


class Library:
    """The functions of the library; every pointer is an integer or packed bytes."""

    def __init__(self, path: Path) -> None:
        self._handle = handle = ctypes.CDLL(str(path))
        found = handle.flashnorm_abi()
        if found != ABI:
            raise OSError(f"{path.name} was built from other sources (ABI {found}, not {ABI})")
        handle.flashnorm_isa.restype = ctypes.c_char_p
        handle.flashnorm_set_prefetch.argtypes = [ctypes.c_int64]
        handle.flashnorm_set_panel_rows.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int64]
        handle.flashnorm_packs.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64]
        handle.flashnorm_rounds_first.argtypes = [ctypes.c_int64] * 2
        handle.flashnorm_tune_thread_pool.argtypes = [ctypes.c_int64] * 3
        handle.flashnorm_thread_pool_calls.restype = ctypes.c_int64
        handle.flashnorm_register_operators.argtypes = [ctypes.POINTER(ctypes.c_void_p)]
        self.register_operators = handle.flashnorm_register_operators
        self.read = handle.flashnorm_read
        self.read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self.set_prefetch = handle.flashnorm_set_prefetch
        # (dtype of weights, many features or not, rows from which x is packed; 0: the usual).
        self.set_panel_rows = handle.flashnorm_set_panel_rows
        self.packs = handle.flashnorm_packs  # (dtype, rows, n)
        # Whether bf16 x [rows, n] is rounded after its norm, as it is multiplied as bf16.
        self.rounds_first = handle.flashnorm_rounds_first
        # Rows of x up to which the pool is asked, bytes, trials (csrc/thread_pool.h).
        self.tune_thread_pool = handle.flashnorm_tune_thread_pool
        self.thread_pool_calls = handle.flashnorm_thread_pool_calls
        self.run, self.normalize, self.glu, self.attend = (
            handle.flashnorm_run,
            handle.flashnorm_normalize,
            handle.flashnorm_glu,
            handle.flashnorm_attend,
        )
        self.run.argtypes = self.normalize.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        self.glu.argtypes = self.attend.argtypes = [ctypes.c_char_p]
        self.threads = self._share_threads()
        self._isa = self.isas[handle.flashnorm_chosen_isa()]

    def _share_threads(self) -> str:
        """Run on the OpenMP runtime that torch has loaded: a second one would fight for the cores.

        Its symbols are looked up through torch's own library, so that no name of a runtime matters.
        """
        if found := torch_symbols("GOMP_parallel", *NUMBERS):
            self._handle.flashnorm_use_openmp(*found, pause())
        elif found := torch_symbols(*KMPC, *NUMBERS):
            self._handle.flashnorm_use_kmpc(*found)
        else:
            return "one thread: torch has no OpenMP runtime with GOMP_parallel"
        return "torch's OpenMP threads"

    @property
    def isas(self) -> list[str]:
        """The instruction sets that the library was built for, best first."""
        names, i = [], 0
        while name := self._handle.flashnorm_isa(i):
            names.append(name.decode())
            i += 1
        return names

    def supported(self) -> list[str]:
        """Those of them that this CPU has."""
        return [name for i, name in enumerate(self.isas) if self._handle.flashnorm_isa_supported(i)]

    @property
    def isa(self) -> str:
        return self._isa

    @isa.setter
    def isa(self, name: str) -> None:
        if name not in self.supported():
            known = ", ".join(self.supported())
            raise FlashNormError(f"no {name!r} kernels in this build or CPU; it has {known}")
        self._handle.flashnorm_choose_isa(self.isas.index(name))
        self._isa = name
        crossovers.apply(self)


@cache
def load() -> Library | str:
    """The library, or why there is none. FLASHNORM_CPU_ISA names the instruction set to use."""
    if not PATH.exists():
        return f"the package was installed without compiled kernels; {REBUILD}"
    try:
        library = Library(PATH)
    except (OSError, AttributeError) as error:
        return f"the compiled kernels do not load ({error}); {REBUILD}"
    library.isa = os.environ.get("FLASHNORM_CPU_ISA") or library.isa
    return library


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run on another instruction set, in the whole process: for tests and comparisons."""
    library = load()
    if isinstance(library, str):
        raise FlashNormError(library)
    with _choosing:
        before = library.isa
        library.isa = name
        try:
            yield
        finally:
            library.isa = before
