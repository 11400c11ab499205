"""Norm + linear on the CPU: weights read once, as a stream, for as many rows of x as that pays.

More rows go to torch's matmul, between a norm and a gate that take one pass each. y is rounded once
from float32 sums; statistics, gain, bias, activation and residual are in float32. Where several
rows are multiplied in tiles (AMX) and in torch's matmul, normalized rows are rounded to the dtype
of x first, as in a model that computes its norm by itself; elsewhere they are not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels.call import ACTIVATIONS, NORMS, Call
from flashnorm.kernels.cpu.library import Library, load, use_isa

__all__ = [
    "available",
    "gate_",
    "normalize_packed",
    "pack",
    "run",
    "run_packed",
    "use_isa",
    "why_not",
]

# The numbers of csrc/api.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NORM = {name: i for i, name in enumerate(NORMS)}
ACTIVATION = {None: 0} | {name: i for i, name in enumerate(ACTIVATIONS, 1)}


# Above so many rows torch's matmul is faster (measured on one Xeon with AVX-512 and AMX).
ROWS = {torch.float32: 16, torch.bfloat16: 16, torch.float16: 16}
ROWS_IN_TILES = 128
# In tiles, where several weights share the work on x: as long as x stays in the second cache.
ROWS_TOGETHER, BYTES_TOGETHER = 512, 2**20
TILE_DEPTH = 32  # elements; rows of x and of weights that are no multiple do not fit into tiles
MOST_WEIGHTS = 8

_OP = [struct.Struct("8iq2d3qq" + "4q" * s).pack for s in range(MOST_WEIGHTS + 1)]
_CALL = [struct.Struct("7q" + "2q" * s).pack for s in range(MOST_WEIGHTS + 1)]
_GLU = struct.Struct("2i11q").pack


def available() -> tuple[bool, str]:
    """Whether the compiled kernels run here, and on what; or why not."""
    library = load()
    if isinstance(library, str):
        return False, library
    return True, f"{library.isa} kernels on {library.threads}"


def why_not(call: Call) -> str | None:
    """Why the kernels cannot take a call, or None where they can. A norm alone has no weights."""
    x, weights, biases, _, _, gain, _, norm_bias, alpha, _, residual = call
    if isinstance(library := load(), str):
        return library
    if not x.is_cpu:
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the kernels take float32, bfloat16 and float16"
    if x.shape[-1] == 0 or len(weights) > MOST_WEIGHTS:
        return f"x has no features, or there are more than {MOST_WEIGHTS} weights"
    dtype = weights[0].dtype if weights else x.dtype
    for w in weights:
        if w.dtype not in DTYPES or w.dtype != dtype or not w.is_cpu:
            return f"the weights are not of one of the kernels' dtypes on the CPU: {w.dtype}"
        if not w.is_contiguous() and w.stride(1) != 1:
            return "a weight's rows are not dense; weight.contiguous() has dense ones"
    for bias in biases or ():
        if bias is not None and (bias.dtype != dtype or not _dense(bias)):
            return f"a bias is not of its weight's dtype, dense, on the CPU: {bias.dtype}"
    for name, vector in (("gain", gain), ("norm_bias", norm_bias), ("alpha", alpha)):
        if vector is not None and (vector.dtype not in DTYPES or not _dense(vector)):
            return f"{name} is not of the kernels' dtypes, dense, on the CPU: {vector.dtype}"
    if residual is not None and (residual.dtype != x.dtype or not residual.is_cpu):
        return f"the residual is not like x: {residual.dtype}"
    return None


def _dense(vector: Tensor) -> bool:
    return vector.is_cpu and vector.is_contiguous()


def run(call: Call) -> list[Tensor]:
    """The operation of `reference.norm_linear`, for a call that `why_not` has nothing against."""
    x, weights = call.x, call.weights
    if x.numel() > most_rows(call) * x.shape[-1]:
        return _many_rows(call)
    widths = [w.shape[0] for w in weights]
    return run_packed(pack(call), x, widths[:1] if call.activation else widths, call.residual)


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


def pack(call: Call) -> bytes:
    """All of a call but x, results and residual, as the library reads it. It holds no reference."""
    x, weights, biases, norm, eps, gain, offset, norm_bias, alpha, activation, _ = call
    weight_type = DTYPES[weights[0].dtype if weights else x.dtype]
    segments: list[int] = []
    for i, w in enumerate(weights):
        c = biases[i] if biases else None
        segments += (w.data_ptr(), 0 if c is None else c.data_ptr(), w.shape[0], w.stride(0))
    return _OP[len(weights)](
        NORM[norm],
        ACTIVATION[activation],
        DTYPES[x.dtype],
        weight_type,
        weight_type,
        0 if gain is None else DTYPES[gain.dtype],
        0 if norm_bias is None else DTYPES[norm_bias.dtype],
        0 if alpha is None else DTYPES[alpha.dtype],
        x.shape[-1],
        eps,
        offset,
        0 if gain is None else gain.data_ptr(),
        0 if norm_bias is None else norm_bias.data_ptr(),
        0 if alpha is None else alpha.data_ptr(),
        len(weights),
        *segments,
    )


def run_packed(
    packed: bytes,
    x: Tensor,
    widths: Sequence[int],
    residual: Tensor | None,
    normalized: Tensor | None = None,
) -> list[Tensor]:
    """The fused kernel on x [.., n], for results of these widths; `normalized` takes norm(x)."""
    shape = x.shape
    n = shape[-1]
    if x.is_contiguous():
        rows, stride = x.numel() // n, n
    else:
        x = _rows(x)
        rows, stride = x.shape[0], x.stride(0)
    added = added_stride = 0
    if residual is not None:
        residual = _rows(residual)
        added, added_stride = residual.data_ptr(), residual.stride(0)
    outputs: list[Tensor] = []
    places: list[int] = []
    for width in widths:
        # Of x, so that no default device or dtype is asked; with strides, which is the fastest.
        y = x.new_empty_strided(*_layout(shape, width))
        outputs.append(y)
        places += (y.data_ptr(), width)
    threads = torch.get_num_threads()
    call = _CALL[len(places) // 2](
        x.data_ptr(),
        added,
        0 if normalized is None else normalized.data_ptr(),
        rows,
        stride,
        added_stride,
        threads,
        *places,
    )
    if _library().run(packed, call):
        raise MemoryError("no memory for the rows of x in float32")
    return outputs


@lru_cache(1 << 12)
def _layout(shape: torch.Size, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a contiguous result for x of this shape."""
    sizes, strides = (*shape[:-1], width), [1]
    for size in sizes[:0:-1]:
        strides.append(strides[-1] * max(size, 1))
    return sizes, tuple(reversed(strides))


def _library() -> Library:
    library = load()
    assert isinstance(library, Library)
    return library


def _rows(x: Tensor) -> Tensor:
    """x as [rows, n] with dense rows, copied only where its strides make it necessary."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _many_rows(call: Call) -> list[Tensor]:
    """Norm, torch's matmul, gate and residual: the norm and the gate are one pass each."""
    x, biases = _rows(call.x), call.biases
    plain = call.norm == "none" and call.gain is None and call.norm_bias is None
    z = x if plain else normalize_packed(pack(call), x, x.new_empty(x.shape))
    found = [F.linear(z, w, biases[i] if biases else None) for i, w in enumerate(call.weights)]
    if call.activation:
        found = [gate_(found[0], found[1], call.activation)]
    if call.residual is not None:
        found[0] += _rows(call.residual)
    return [y.view(*call.x.shape[:-1], y.shape[1]) for y in found]


def normalize_packed(packed: bytes, x: Tensor, z: Tensor) -> Tensor:
    """z = norm(x) · gain + bias in the dtype of x, for x [.., n] with dense rows, one pass."""
    n = x.shape[-1]
    stride = n if x.is_contiguous() else x.stride(0)
    threads = torch.get_num_threads()
    call = _CALL[0](x.data_ptr(), 0, z.data_ptr(), x.numel() // n, stride, 0, threads)
    if _library().normalize(packed, call):
        raise MemoryError("no memory for a row of x in float32")
    return z


def gate_(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) ⊙ up, written over gate: [rows, width]."""
    rows, width = gate.shape
    place, stride = gate.data_ptr(), gate.stride(0)
    packed = _GLU(
        ACTIVATION[activation],
        DTYPES[gate.dtype],
        place,
        up.data_ptr(),
        place,
        0,
        rows,
        width,
        stride,
        up.stride(0),
        stride,
        0,
        torch.get_num_threads(),
    )
    if _library().glu(packed):
        raise MemoryError("no memory for a row of the gate in float32")
    return gate
