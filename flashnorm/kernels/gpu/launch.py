"""How a kernel is cut into programs, as data: defaults by shape, dtype and device.

The defaults follow from sizes alone (bytes in flight, registers, shared memory); nothing here has
been timed. What was measured on a card is in the file that `measured` reads, and comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from flashnorm.kernels.gpu import switches


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

    @property
    def starts_early(self) -> bool:
        """Whether kernels start before those in front of them have ended; not when interpreted."""
        return self.capability >= (9, 0) and switches.on("early") and not interpreted()


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU in this process."""
    import triton

    return bool(triton.knobs.runtime.interpret)


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
    """Tiles that the multiprocessors have equally much of; parts of n where k is small.

    widths: columns of the results of one launch.
    """
    if rows == 1:
        return _one_row(n, widths, dtype, gated, device)
    height = power_of_two(rows, 16)
    if dtype == torch.float32:  # multiplied without matrix units, from registers
        tile = Tile(height, 16, min(power_of_two(n, 16), 16 if height <= 16 else 32), 4, 3)
    else:
        depth = min(power_of_two(n, 16), 128 if height <= 16 else 64)
        tile = Tile(height, 64, depth, 4, 3 if height > 16 or gated else 4)
    return replace(tile, splits=_splits(n, tile.columns, widths, device.processors))


def _one_row(
    n: int, widths: Sequence[int], dtype: torch.dtype, gated: bool, device: Device
) -> Tile:
    if dtype == torch.float32:
        columns, depth = 4, 256
    else:
        columns = 4 if gated else _columns((8, 4), widths, 2 * device.processors)
        depth = 4096 // columns
    depth = min(power_of_two(n, 16), depth)
    few = blocks(columns, widths) < device.processors
    splits = _splits(n, columns, widths, device.processors) if few else 1
    return Tile(1, columns, depth, 4, 4, splits)


def packed_tile(
    rows: int,
    n: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    each: int,
    group: int,
    gated: bool,
    device: Device,
) -> Tile:
    """Tiles of weights with `each` features in a byte, of which `group` share a scale (0: a row).

    A step ends with a group, and up to 32 rows every thread copies 16 bytes of it at least. By
    element, several features in a byte would take longer to unpack than to read, and scales of
    groups would not stay with the threads that need them: the matrix units take one row of half
    precision as well.
    """
    by_element = rows == 1 and (dtype == torch.float32 or (each == 1 and not group))
    height = 1 if by_element else power_of_two(rows, 16)
    if by_element:
        most = 512
    elif dtype == torch.float32:
        most = 32
    else:
        most = 64 if height > 32 or (gated and each == 1) else 128
    depth = min(power_of_two(n, 16 * each), most)
    if group:
        depth = min(depth, group & -group)
    size = depth // each
    stages = 3 if height > 16 or gated else 4
    if by_element:
        columns, warps = (2048 if gated else 4096) // size, 4
    elif dtype == torch.float32:
        columns, warps = 16, 4 if height <= 32 else 8
        stages = 2 if gated and height > 32 else stages
    elif height > 32:  # no more sums fit into the registers
        columns, warps = 32, 4
    elif size >= 64:
        columns, warps = 64, 8
    else:  # small programs, of which a multiprocessor holds many; with more stages they spill
        columns, warps, stages = 64, height // 8, 3 if gated else 2
    tile = Tile(height, columns, depth, warps, stages)
    return replace(tile, splits=_splits(n, columns, widths, device.processors))


def _columns(choices: Sequence[int], widths: Sequence[int], programs: int) -> int:
    """The most columns that still give so many programs; else the fewest."""
    for columns in choices:
        if blocks(columns, widths) >= programs:
            return columns
    return choices[-1]


def blocks(columns: int, widths: Sequence[int]) -> int:
    """Programs that so many columns each give, for results of these widths."""
    return sum(-(-width // columns) for width in widths)


PARTS = 8  # of n, at most
LEAST = 512  # elements of n in a part
EXTRA = 96  # what a part costs beside its elements, in elements: it is stored and added up


def _splits(n: int, columns: int, widths: Sequence[int], processors: int) -> int:
    """The parts of n with which the multiprocessor that has most of the programs has least to do.

    Each works on one program at a time in this count; that it has room for more changes little
    where all of them wait for the same memory.
    """
    programs = blocks(columns, widths)

    def longest(splits: int) -> int:
        length = -(-n // splits)
        extra = EXTRA * splits if splits > 1 else 0
        return -(-programs * splits // processors) * length + extra

    return min(range(1, max(1, min(PARTS, n // LEAST)) + 1), key=longest)


AHEAD = 16 * 1024  # bytes of weights that a program asks for before it may begin


def lines_ahead(tile: Tile, n: int, dtype: torch.dtype, gated: bool) -> int:
    """Cache lines of 128 bytes of each weight row that a program asks for, a power of two."""
    part = -(-n // tile.splits) * dtype.itemsize
    most = AHEAD // ((1 + gated) * tile.columns * 128)
    return max(1, min(power_of_two(-(-part // 128)), most))


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
