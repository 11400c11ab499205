"""What runs on the CPU's kernels, and what on torch's matmul: by dtype, features and rows."""

from __future__ import annotations

import torch

from flashnorm.kernels.backend import CompiledPolicy, Limits, Policy, Precompute, Way
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu.library import Library, load
from flashnorm.kernels.weights import DTYPES, HALVES

MOST_WEIGHTS = 8
LIMITS = Limits(tuple(DTYPES), MOST_WEIGHTS, contiguous=True)
POLICY = Policy(Precompute.ALWAYS, idle="", few=Way.KERNEL, many=Way.BLOCKS)
# Where a graph is exported for any number of rows, the operator chooses in Python at every call: in
# float32 the graph's own product is faster then.
COMPILED = CompiledPolicy(alone=True, precompute=False, unknown=HALVES)

# Above so many rows torch's matmul is faster (measured on one Xeon with AVX-512 and AMX).
ROWS = dict.fromkeys(DTYPES, 16)
ROWS_IN_TILES = 128
# In tiles, where several weights share the work on x: as long as x stays in the second cache.
ROWS_TOGETHER, BYTES_TOGETHER = 512, 2**20
TILE_DEPTH = 32  # elements; rows of x and of weights that are no multiple do not fit into tiles


def most_rows(call: Call) -> int:
    """How many rows of x the fused kernel takes before torch's matmul does."""
    if any(weight.dtype != call.x.dtype for weight in call.weights):
        return 2**62
    return rows_for(call.x.dtype, call.x.shape[-1], len(call.weights))


def rows_for(dtype: torch.dtype, n: int, weights: int) -> int:
    """The same, by what it depends on: dtype and features of x, and how many weights there are."""
    if not _fits_tiles(dtype, n):
        return ROWS.get(dtype, 0)
    if weights <= 1:
        return ROWS_IN_TILES
    return max(ROWS_IN_TILES, min(ROWS_TOGETHER, BYTES_TOGETHER // (2 * n)))


def in_tiles(call: Call) -> bool:
    """Whether several rows of x are multiplied in tiles."""
    return _fits_tiles(call.x.dtype, call.x.shape[-1])


def _fits_tiles(dtype: torch.dtype, n: int) -> bool:
    library = load()
    amx = isinstance(library, Library) and library.isa == "amx"
    return amx and dtype == torch.bfloat16 and n % TILE_DEPTH == 0
