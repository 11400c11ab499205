"""The operation as the library runs it, in the way that it chooses or in one that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from flashnorm.functional import fused
from flashnorm.kernels import dispatch, norms
from flashnorm.kernels.call import Call

CHOSEN = "chosen"  # the way that dispatch takes
WAYS = ("skinny", "gemm", "matmul")
LIBRARY = "library"  # the other sides: the norm, rounded, then the library's product
TILED = ("skinny", "gemm")  # kernels of ours multiply


def kernels() -> Any | None:
    """The GPU backend, where this version of the library has one."""
    if find_spec("flashnorm.kernels.gpu") is None:
        return None
    from flashnorm.kernels import gpu

    return gpu


def switched_off(*names: str) -> AbstractContextManager[None]:
    """A context without these parts of the GPU's kernels; nothing where there are none."""
    if kernels() is None:
        return nullcontext()
    from flashnorm.kernels.gpu import switches

    return switches.off(*names)


def starts_early(call: Call) -> bool:
    """Whether the kernel of a call starts before the one in front of it has ended."""
    from flashnorm.kernels.gpu import launch

    return launch.device_of(call.x).starts_early


def skinny_tile(call: Call) -> Any:
    """The tile that the kernel for few rows is cut into by default."""
    from flashnorm.kernels.gpu import launch

    gated, (rows, n) = call.activation is not None, call.x.shape
    widths = [w.shape[0] for w in call.results()]
    return launch.skinny_tile(rows, n, widths, call.x.dtype, gated, launch.device_of(call.x))


def ways(rows: int, device: str) -> tuple[str, ...]:
    """What can be asked for with so many rows."""
    if device == "cpu" or kernels() is None:
        return (CHOSEN,)
    from flashnorm.kernels.gpu.launch import MOST_ROWS

    return tuple(way for way in WAYS if way != "skinny" or rows <= MOST_ROWS)


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

    found = _outputs(call) if outputs is None else outputs
    if way == "matmul":
        return _around_a_product(call, found)
    make = skinny.steps if way == "skinny" else gemm.steps
    return make(call, found, launch.device_of(call.x), tile)


def _around_a_product(call: Call, outputs: list[Tensor]) -> Iterator[Any]:
    """The passes before and behind a product of the library's, as far as they are kernels."""
    from flashnorm.kernels.gpu import gemm, matmul, rows

    late, s = matmul.scales_late(call), call.x.new_empty(call.x.shape[0], dtype=torch.float32)
    if late:
        yield rows.row_scale_step(call.x, norms.RMS, call.eps, s, None)
    elif not gemm.as_it_is(call):
        yield rows.normalize_step(call, torch.empty_like(call.x))
    if call.activation or call.output_residual is not None:
        yield rows.gate_step(call, outputs, s if late else None, outputs[0])


def compile_ahead(jobs: list[tuple[Call, str, Any]]) -> None:
    """Compile the kernels of (call, way, tile) on all cores; what fails will fail again."""

    def compile_one(step: Any) -> None:
        step.kernel.warmup(**step.arguments, **step.options(), grid=step.grid)

    different = {_alike(step): step for job in jobs if job[1] in WAYS for step in _steps_of(*job)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for made in [pool.submit(compile_one, step) for step in different.values()]:
            made.exception()


def _steps_of(call: Call, way: str, tile: Any) -> list[Any]:
    try:
        return list(steps(call, way, tile))
    except Exception:
        return []


def _alike(step: Any) -> tuple[Any, ...]:
    """The same for launches of one compiled kernel."""
    given = (
        (name, str(value.dtype) if isinstance(value, Tensor) else value)
        for name, value in step.arguments.items()
    )
    return (step.kernel.__name__, step.warps, step.stages, *given)


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
