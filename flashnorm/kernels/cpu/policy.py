"""What runs on the CPU's kernels, and what on torch's matmul: by dtype, features and rows."""

from __future__ import annotations

import torch

from flashnorm.kernels.backend import CompiledPolicy, Limits, Policy, Precompute, Way
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import crossovers
from flashnorm.kernels.cpu.library import Library, load
from flashnorm.kernels.weights import DTYPES, HALVES, packed, turned

MOST_WEIGHTS = 8
TOKENS_OF_EXPERTS = 16  # in all; every expert has its share of them
ROWS_TURNED = 16  # of x, where weights are held as [in, out]
ANY = 2**62  # rows
LIMITS = Limits(tuple(DTYPES), MOST_WEIGHTS, contiguous=True, turned=ROWS_TURNED, packed=ANY)
POLICY = Policy(Precompute.ALWAYS, idle="", few=Way.KERNEL, many=Way.BLOCKS)
# Where a graph is exported for any number of rows, the operator chooses in Python at every call: in
# float32 the graph's own product is faster then.
COMPILED = CompiledPolicy(alone=True, precompute=True, unknown=HALVES)

# In tiles, where several weights share the work on x: as long as x stays in the second cache.
ROWS_TOGETHER, BYTES_TOGETHER = 512, 2**20
TILED = (torch.bfloat16,)
TILE_DEPTH = 32  # elements; rows of x and of weights that are no multiple do not fit into tiles


def most_rows(call: Call) -> int:
    """How many rows of x the fused kernel takes before torch's matmul does."""
    if packed(call.weights) or any(weight.dtype != call.x.dtype for weight in call.weights):
        return ANY
    if any(turned(weight) for weight in call.dense_weights()):
        return ROWS_TURNED
    return rows_for(call.x.dtype, call.x.shape[-1], len(call.weights))


def rows_for(dtype: torch.dtype, n: int, weights: int) -> int:
    """The same, by what it depends on: dtype and features of x, and how many weights there are."""
    library = load()
    if dtype not in DTYPES or not isinstance(library, Library):
        return 0
    most = crossovers.find(library.isa, dtype, n).library
    if not _fits_tiles(dtype, n):  # what is known of bf16 with AMX is known of tiles
        return min(most, crossovers.FEW) if library.isa == "amx" and dtype in TILED else most
    if weights <= 1:
        return most
    return max(most, min(ROWS_TOGETHER, BYTES_TOGETHER // (2 * n)))


def explain(call: Call) -> str:
    """Which way a call goes, and by what measurement."""
    library = load()
    assert isinstance(library, Library)
    x = call.x
    n = x.shape[-1]
    if weight := packed(call.weights):
        return f"{weight.format.name} weights, decoded as they are loaded"
    crossover, rows = crossovers.find(library.isa, x.dtype, n), x.numel() // n
    if rows > most_rows(call):
        way = "torch's matmul after a pass for the norm"
    elif any(turned(w) for w in call.dense_weights()):
        return "weights held as [in, out], row by row"
    else:
        way = "x packed first" if library.packs(DTYPES[x.dtype], rows, n) else "rows as they come"
    return f"{way} ({crossovers.key(x.dtype, n)}: {crossover.note})"


def rounds_first(call: Call) -> bool:
    """Whether so many rows of x are multiplied as bf16, in tiles or pairs: z is rounded first."""
    x, library = call.x, load()
    if not isinstance(library, Library) or not x.numel():
        return False
    if packed(call.weights) or x.dtype != torch.bfloat16:
        return False
    if any(w.dtype != x.dtype for w in call.weights):
        return False
    if any(turned(w) for w in call.dense_weights()):
        return False
    n = x.shape[-1]
    return bool(library.rounds_first(x.numel() // n, n))


def _fits_tiles(dtype: torch.dtype, n: int) -> bool:
    library = load()
    amx = isinstance(library, Library) and library.isa == "amx"
    return amx and dtype in TILED and n % TILE_DEPTH == 0
