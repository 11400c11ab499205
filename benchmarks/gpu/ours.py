"""The operation as the library runs it, in the way that it chooses or in one that is asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from flashnorm.functional import fused
from flashnorm.kernels import dispatch
from flashnorm.kernels.call import Call

CHOSEN = "chosen"  # the way that dispatch takes
WAYS = ("skinny", "gemm", "matmul")
LIBRARY = "library"  # the other sides: the norm, rounded, then the library's product
TILED = ("skinny", "gemm")  # kernels of ours multiply
THREADS = 12  # that compile at once


def kernels() -> Any | None:
    """The GPU backend, where this version of the library has one."""
    if find_spec("flashnorm.kernels.gpu") is None:
        return None
    from flashnorm.kernels import gpu

    return gpu


def ways(rows: int, device: str) -> tuple[str, ...]:
    """What can be asked for with so many rows, the chosen way first."""
    if device == "cpu" or kernels() is None:
        return (CHOSEN,)
    from flashnorm.kernels.gpu.launch import MOST_ROWS

    return (CHOSEN, *(way for way in WAYS if way != "skinny" or rows <= MOST_ROWS))


def run(call: Call, way: str = CHOSEN, tile: Any = None) -> list[Tensor]:
    """The results in one of the ways; with a tile of our own where one is given."""
    if way == CHOSEN:
        return fused.run(call)
    gpu = kernels()
    assert gpu is not None
    if tile is None:
        found: list[Tensor] = gpu.run(call, way=way)
        return found
    outputs = _outputs(call)
    from flashnorm.kernels.gpu.step import execute

    execute(steps(call, way, tile, outputs))
    return outputs


def steps(call: Call, way: str, tile: Any, outputs: list[Tensor] | None = None) -> Any:
    """The launches of a call with rows that are dense."""
    from flashnorm.kernels.gpu import gemm, launch, skinny

    make = skinny.steps if way == "skinny" else gemm.steps
    found = _outputs(call) if outputs is None else outputs
    return make(call, found, launch.device_of(call.x), tile)


def compile_ahead(jobs: list[tuple[Call, str, Any]]) -> None:
    """Compile the kernels of (call, way, tile), several at once; what fails will fail again."""

    def compile_one(call: Call, way: str, tile: Any) -> None:
        for step in steps(call, way, tile):
            options = {"num_warps": step.warps, "num_stages": step.stages}
            step.kernel.warmup(**step.arguments, **options, grid=step.grid)

    with ThreadPoolExecutor(THREADS) as pool:
        for made in [pool.submit(compile_one, *job) for job in jobs]:
            made.exception()


def _outputs(call: Call) -> list[Tensor]:
    weights = call.weights[:1] if call.activation else call.weights
    return [call.x.new_empty(call.x.shape[0], weight.shape[0]) for weight in weights]


def explain(call: Call) -> str:
    """Which way dispatch takes, and why."""
    choice = dispatch.explain(call)
    return f"{choice.backend}: {choice.reason}"


def way_of(call: Call, way: str) -> str:
    """What runs in truth: a way of the GPU's, or the name of another backend."""
    if way != CHOSEN:
        return way
    choice = dispatch.explain(call)
    return choice.reason.partition(":")[0] if choice.backend == "gpu" else choice.backend


def rounds_first(call: Call, way: str) -> bool | None:
    """Whether a way of ours rounds norm(x) before it multiplies; None where it is no such way."""
    if way not in WAYS:
        return None
    from tests.kernels.gpu.calls import rounds_first

    return rounds_first(call, way)
