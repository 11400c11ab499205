"""How a kernel is cut into programs, as data: defaults by shape, dtype and device.

The defaults follow from sizes alone (bytes in flight, registers, shared memory); nothing here has
been timed. What was measured on a card is in the file that `measured` reads, and comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """One program's share: rows of x, columns of the result, elements of n at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class Device:
    """What the choice of a tile depends on."""

    name: str
    capability: tuple[int, int]
    processors: int


# Stands in for the GPU where there is none: in the interpreter and where kernels are compiled only.
HOPPER = Device("no device (as an H100)", (9, 0), 132)
MOST_ROWS = 64  # of x, in the skinny kernel
GROUP = 8  # rows of tiles that share the second cache in a GEMM


def device_of(x: torch.Tensor) -> Device:
    return _device(x.device.index or 0) if x.is_cuda else HOPPER


@cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(found.name, (found.major, found.minor), found.multi_processor_count)


def single(number: float) -> float:
    """A number that float32 knows: kernels are given no other, and ε may be smaller than all."""
    return float(number) if abs(number) >= 2.0**-126 else 0.0


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not smaller than either."""
    return max(least, 1 << (number - 1).bit_length())


def skinny_tile(
    rows: int, n: int, widths: Sequence[int], dtype: torch.dtype, gated: bool, device: Device
) -> Tile:
    """Few columns each, so that every multiprocessor streams weights; parts of n where k is small.

    widths: columns of the results of one launch.
    """
    if rows == 1:
        return _one_row(n, widths, dtype, gated, device)
    height = power_of_two(rows, 16)
    if dtype == torch.float32:  # multiplied without matrix units, from registers
        splits = _splits(n, 16, widths, device.processors)
        return Tile(height, 16, min(power_of_two(n, 16), 32), 4, 3, splits)
    columns = _columns((64, 32, 16), widths, device.processors)
    depth = min(power_of_two(n, 16), 128 if height <= 16 else 64)
    if height > 16:  # x is read by every program: wider ones read it less often
        columns = max(columns, height)
    warps = max(1, columns // 16)
    stages = 3 if height > 16 or columns > 32 else 4
    splits = _splits(n, columns, widths, device.processors)
    return Tile(height, columns, depth, warps, stages, splits)


def _one_row(
    n: int, widths: Sequence[int], dtype: torch.dtype, gated: bool, device: Device
) -> Tile:
    if dtype == torch.float32:
        columns, depth = 4, 256
    else:
        columns = 4 if gated else _columns((8, 4), widths, 2 * device.processors)
        depth = 4096 // columns
    depth = min(power_of_two(n, 16), depth)
    return Tile(1, columns, depth, 4, 4, _splits(n, columns, widths, device.processors))


def _columns(choices: Sequence[int], widths: Sequence[int], programs: int) -> int:
    """The most columns that still give so many programs; else the fewest."""
    for columns in choices:
        if _blocks(columns, widths) >= programs:
            return columns
    return choices[-1]


def _blocks(columns: int, widths: Sequence[int]) -> int:
    return sum(-(-width // columns) for width in widths)


def _splits(n: int, columns: int, widths: Sequence[int], processors: int) -> int:
    """Parts of n: a second kernel has to add them up, which only long rows are worth."""
    if len(widths) > 1:
        return 1
    free = processors // max(1, _blocks(columns, widths))
    return max(1, min(free, 8, n // 2048)) if free >= 2 else 1


def gemm_tile(
    rows: int, k: int, dtype: torch.dtype, gated: bool, device: Device, residual: bool = False
) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 32 if gated else 64, 16 if gated else 32, 4, 2)
    if gated:  # two sums per column: more columns would not fit into the registers
        return Tile(128, 64 if residual or device.capability < (9, 0) else 128, 64, 8, 3)
    if device.capability >= (9, 0) and -(-rows // 128) * (k // 256) >= device.processors:
        return Tile(128, 256, 64, 8, 3)
    return Tile(128, 128, 64, 8 if device.capability < (9, 0) else 4, 3)


def row_width(n: int) -> tuple[int, int]:
    """Elements and warps of a program that holds a whole row."""
    width = power_of_two(n, 16)
    return width, min(max(width // 512, 1), 16)
