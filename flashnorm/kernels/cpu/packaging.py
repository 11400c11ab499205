"""What AOTInductor is told of the operators, so that its code calls their C entries by name."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from flashnorm.kernels import backend
from flashnorm.kernels.cpu import operators
from flashnorm.kernels.cpu.library import ABI, PATH, Library, load

# The functions at the end of csrc/operators.cpp.
NORM_LINEAR = (
    "AOTITorchError aoti_torch_cpu_norm_linear_cpu(AtenTensorHandle x, "
    "const AtenTensorHandle* weights, int64_t many_weights, "
    "const AtenTensorHandle* vectors, int64_t many_vectors, int64_t which, int64_t norm, "
    "double eps, double gain_offset, int64_t activation, AtenTensorHandle* result)"
)
NORM_PACKED = NORM_LINEAR.replace("norm_linear", "norm_packed").replace(
    ", AtenTensorHandle* result",
    ", int64_t format, int64_t group, int64_t part, const int64_t* rows, int64_t many_rows, "
    "AtenTensorHandle* result",
)
ATTEND = (
    "AOTITorchError aoti_torch_cpu_attend_cpu(AtenTensorHandle q, AtenTensorHandle k, "
    "AtenTensorHandle v, const AtenTensorHandle* mask, int64_t many_masks, double scale, "
    "AtenTensorHandle* result)"
)


class Packaging(backend.Packaging):
    """The operators of `cpu.operators`, in code that is compiled for this processor."""

    def why_not(self) -> str:
        library = load()
        if isinstance(library, str):
            return library
        if os.name == "nt":
            return "compiled code calls the kernels by their names, which Windows does not look up"
        return "" if operators.AVAILABLE else "the library's operators could not be registered"

    def entries(self) -> dict[Any, list[str]]:
        found = torch.ops.flashnorm
        return {
            found.norm_linear_cpu.default: [NORM_LINEAR],
            found.norm_packed_cpu.default: [NORM_PACKED],
            found.attend_cpu.default: [ATTEND],
        }

    def adding(
        self, operator: Any, arguments: tuple[Any, ...], residual: Any
    ) -> tuple[Any, ...] | None:
        found = torch.ops.flashnorm
        if operator not in (found.norm_linear_cpu.default, found.norm_packed_cpu.default):
            return None
        return operators.adding(arguments, residual)

    def options(self) -> dict[str, object]:
        # What is left between kernels is small, and threads that spin after it would be in the way
        # of the kernels' own.
        return {"cpp.threads": 1}

    def expose(self) -> None:
        ctypes.CDLL(str(PATH), mode=ctypes.RTLD_GLOBAL)

    def described(self) -> dict[str, str]:
        library = load()
        assert isinstance(library, Library)
        return {
            "kernels": f"{library.isa}, interface {ABI}",
            "processor": f"{platform.system()} {platform.machine()}, features {_features()}",
        }


def _features() -> str:
    """A short name for the instruction sets that a compiler may use here."""
    found = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return f"{found}, {platform.processor()}"
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    names = " ".join(sorted(flags.partition(":")[2].split()))
    return f"{found}, {hashlib.sha256(names.encode()).hexdigest()[:16]}"
