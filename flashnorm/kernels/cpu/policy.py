"""What runs on the CPU's kernels, and what on torch's matmul: by dtype, features and rows."""

from __future__ import annotations

import torch

from flashnorm.kernels.backend import CompiledPolicy, Limits, Policy, Precompute, Way
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import crossovers
from flashnorm.kernels.cpu.library import Library, load
from flashnorm.kernels.weights import DTYPES, HALVES

MOST_WEIGHTS = 8
LIMITS = Limits(tuple(DTYPES), MOST_WEIGHTS, contiguous=True)
POLICY = Policy(Precompute.ALWAYS, idle="", few=Way.KERNEL, many=Way.BLOCKS)
# Where a graph is exported for any number of rows, the operator chooses in Python at every call: in
# float32 the graph's own product is faster then.
COMPILED = CompiledPolicy(alone=True, precompute=False, unknown=HALVES)

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
    library = load()
    if dtype not in DTYPES or not isinstance(library, Library):
        return 0
    most = crossovers.find(library.isa, dtype, n).library
    if not _fits_tiles(dtype, n):
        return min(most, crossovers.FEW) if library.isa == "amx" else most
    if weights <= 1:
        return most
    return max(most, min(ROWS_TOGETHER, BYTES_TOGETHER // (2 * n)))


def rounds_first(call: Call) -> bool:
    """Whether so many rows of x are multiplied as bf16, in tiles or in pairs: z is rounded first."""
    x, library = call.x, load()
    if not isinstance(library, Library) or not x.numel():
        return False
    if x.dtype != torch.bfloat16 or any(w.dtype != x.dtype for w in call.weights):
        return False
    n = x.shape[-1]
    return bool(library.rounds_first(x.numel() // n, n))


def _fits_tiles(dtype: torch.dtype, n: int) -> bool:
    library = load()
    amx = isinstance(library, Library) and library.isa == "amx"
    return amx and dtype == torch.bfloat16 and n % TILE_DEPTH == 0
