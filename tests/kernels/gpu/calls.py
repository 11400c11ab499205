"""Calls where the kernels run, and their results held against the float64 reference."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flashnorm.kernels import gpu
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import matmul
from flashnorm.kernels.gpu.gemm import as_it_is, only_scales
from flashnorm.kernels.gpu.launch import MOST_ROWS
from flashnorm.kernels.gpu.ways import interpreted
from tests.kernels.bounds import assert_close

DEVICE = "cpu" if interpreted() else "cuda"
WAYS = ("skinny", "gemm", "matmul")


def on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        # With all that lies between its elements: `to` alone would make some of them contiguous.
        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(DEVICE)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())
    return [on_device(v) for v in value] if isinstance(value, (list, tuple)) else value


def there(call: Call) -> Call:
    """The same call where the kernels run; strides stay."""
    return Call(*map(on_device, call))


def ways(call: Call) -> list[str]:
    rows = call.x.numel() // call.x.shape[-1]
    return [way for way in WAYS if way != "skinny" or rows <= MOST_ROWS]


def rounds_first(call: Call, way: str) -> bool:
    """Whether a way rounds norm(x) to the dtype of x before it multiplies."""
    if as_it_is(call):
        return False
    if way == "skinny":
        several = call.x.numel() > call.x.shape[-1]
        return several and not only_scales(call)
    late = way == "gemm" or matmul.scales_late(call)
    return not (late and only_scales(call))


def check(call: Call, *chosen: str, what: object = "") -> None:
    """Every way that takes the call, or the chosen ones, within the bound of its roundings."""
    moved = there(call)
    assert gpu.why_not(moved) is None, what
    for way in chosen or ways(call):
        found = [y.cpu() for y in gpu.run(moved, way)]
        assert_close(
            call, found, fused=way != "matmul", what=(way, what), first=rounds_first(call, way)
        )


@contextmanager
def permuted(seed: int) -> Iterator[None]:
    """Within it the interpreter runs the programs of a launch in an order of chance."""
    from triton.runtime.interpreter import interpreter_builder as builder

    given, orders = builder.set_grid_idx, {}

    def set_grid_idx(*place: int) -> None:
        grid = tuple(builder.grid_dim)
        if grid not in orders:
            places = list(itertools.product(*map(range, grid)))
            orders[grid] = dict(
                zip(places, random.Random(seed).sample(places, len(places)), strict=True)
            )
        given(*orders[grid][place])

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_idx
