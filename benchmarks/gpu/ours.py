"""The operation as the library runs it, in the way that it chooses or in one that is asked for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from flashnorm.functional import fused
from flashnorm.kernels import dispatch
from flashnorm.kernels.call import Call

CHOSEN = "chosen"  # the way that dispatch takes
WAYS = ("skinny", "gemm", "matmul")


def kernels() -> Any | None:
    """The GPU backend, where this version of the library has one."""
    if find_spec("flashnorm.kernels.gpu") is None:
        return None
    from flashnorm.kernels import gpu

    return gpu


def ways(device: str) -> tuple[str, ...]:
    """All ways that can be asked for on this device, the chosen one first."""
    return (CHOSEN, *WAYS) if device != "cpu" and kernels() else (CHOSEN,)


def run(call: Call, way: str = CHOSEN) -> list[Tensor]:
    if way == CHOSEN:
        return fused.run(call)
    gpu = kernels()
    assert gpu is not None
    found: list[Tensor] = gpu.run(call, way=way)
    return found


def explain(call: Call) -> str:
    """Which way dispatch takes, and why."""
    choice = dispatch.explain(call)
    return f"{choice.backend}: {choice.reason}"
