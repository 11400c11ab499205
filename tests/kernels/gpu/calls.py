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
from flashnorm.kernels.gpu.launch import HOPPER, MOST_ROWS, interpreted
from flashnorm.kernels.gpu.packed import default_tile
from flashnorm.kernels.weights import Weight, packed
from tests.kernels.bounds import assert_close

DEVICE = "cpu" if interpreted() else "cuda"
WAYS = ("skinny", "gemm", "matmul")
BITS = {2: torch.int16, 4: torch.int32}  # a NaN is not equal to itself


def on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        # With all that lies between its elements: `to` alone would make some of them contiguous.
        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(DEVICE)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, Weight):
        return Weight(*map(on_device, value))
    return [on_device(v) for v in value] if isinstance(value, (list, tuple)) else value


def there(call: Call) -> Call:
    """The same call where the kernels run; strides stay."""
    return Call(*map(on_device, call))


def ways(call: Call) -> list[str]:
    if packed(call.weights):
        return ["skinny"]
    rows = call.x.numel() // call.x.shape[-1]
    return [way for way in WAYS if way != "skinny" or rows <= MOST_ROWS]


def rounds_first(call: Call, way: str) -> bool:
    """Whether a way rounds norm(x) to the dtype of x before it multiplies."""
    if as_it_is(call):
        return False
    if way == "skinny":
        several = call.x.numel() > call.x.shape[-1]
        if packed(call.weights):
            several = default_tile(call, [0], HOPPER).rows > 1
        return several and not only_scales(call)
    late = way == "gemm" or matmul.scales_late(call)
    return not (late and only_scales(call))


def check(call: Call, *chosen: str, what: object = "", alike: bool = True) -> None:
    """Every way that takes the call, or the chosen ones, within the bound of its roundings."""
    moved = there(call)
    assert gpu.why_not(moved) is None, what
    for way in chosen or ways(call):
        found = [y.cpu() for y in gpu.run(moved, way)]
        if interpreted():  # an order of programs that no GPU would choose, and any could
            with permuted(len(way)):
                again = gpu.run(moved, way)
            for y, other in zip(found, again, strict=True):
                assert torch.equal(y.view(BITS[y.itemsize]), other.view(BITS[y.itemsize])), what
        first, fused = rounds_first(call, way), way != "matmul"
        assert_close(call, found, fused, (way, what), first, alike)


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
