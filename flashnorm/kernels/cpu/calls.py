"""Norm + linear on the CPU: weights read once, as a stream, for as many rows of x as that pays.

More rows go to torch's matmul, between a norm and a gate that take one pass each. y is rounded once
from float32 sums; statistics, gain, bias, activation and residual are in float32. Where several
rows are multiplied as bf16 (tiles with AMX, pairs with AVX-512-BF16) and in torch's matmul,
normalized rows are rounded to the dtype of x first, as in a model that computes its norm by itself;
elsewhere they are not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels import norms
from flashnorm.kernels.call import ACTIVATIONS, Call
from flashnorm.kernels.cpu import packing
from flashnorm.kernels.cpu.library import Library, load
from flashnorm.kernels.cpu.policy import MOST_WEIGHTS, most_rows
from flashnorm.kernels.weights import DTYPES, Weight, dense_rows, packed, turned

ACTIVATION = {None: 0} | {name: i for i, name in enumerate(ACTIVATIONS, 1)}  # as in csrc/api.h

_OP = [struct.Struct("12i2q2d4q" + "15q" * s).pack for s in range(MOST_WEIGHTS + 1)]
NO_GRIDS = (0,) * 10  # of a segment: scales, zeros, offsets and table
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
    x, weights, biases, norm, _, gain, _, norm_bias, alpha, _, residual, added = call
    if isinstance(library := load(), str):
        return library
    if not x.is_cpu:
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the kernels take float32, bfloat16 and float16"
    if norm.code is None:
        return f"the kernels do not know the norm {norm.name!r}"
    if x.shape[-1] == 0 or len(weights) > MOST_WEIGHTS:
        return f"x has no features, or there are more than {MOST_WEIGHTS} weights"
    dense = () if packed(weights) else call.dense_weights()
    if reason := packing.why_not(call) or _why_not_dense(x, dense):
        return reason
    dtype = dense[0].dtype if dense else x.dtype
    for bias in biases or ():
        if bias is not None and (bias.dtype not in DTYPES or not _dense(bias)):
            return f"a bias is not of the kernels' dtypes, dense, on the CPU: {bias.dtype}"
        if bias is not None and dense and bias.dtype != dtype:
            return f"a bias is not of its weight's dtype: {bias.dtype}"
    for name, vector in (("gain", gain), ("norm_bias", norm_bias), ("alpha", alpha)):
        if vector is not None and (vector.dtype not in DTYPES or not _dense(vector)):
            return f"{name} is not of the kernels' dtypes, dense, on the CPU: {vector.dtype}"
    for given in (residual, added):
        if given is not None and (given.dtype != x.dtype or not given.is_cpu):
            return f"the residual is not like x: {given.dtype}"
    return None


def _why_not_dense(x: Tensor, weights: Sequence[Tensor]) -> str:
    for w in weights:
        if w.dtype not in DTYPES or w.dtype != weights[0].dtype or not w.is_cpu:
            return f"the weights are not of one of the kernels' dtypes on the CPU: {w.dtype}"
        if not (dense_rows(w) or turned(w)):
            return "a weight's rows are not dense; weight.contiguous() has dense ones"
    if len({turned(w) for w in weights}) > 1:
        return "some weights are held as [out, in], some as [in, out]: one call takes one layout"
    return ""


def _dense(vector: Tensor) -> bool:
    return vector.is_cpu and vector.is_contiguous()


def run(call: Call) -> list[Tensor]:
    """The operation of `reference.norm_linear`, for a call that `why_not` has nothing against."""
    call = call.added()
    x = call.x
    if x.numel() > most_rows(call) * x.shape[-1]:
        return _many_rows(call)
    widths = [w.shape[0] for w in call.results()]
    return run_packed(pack(call), x, widths, call.output_residual)


def pack(call: Call) -> bytes:
    """All of a call but x, results and residual, as the library reads it. It holds no reference."""
    x, weights, biases, norm, eps, gain, offset, norm_bias, alpha, activation, *_ = call
    first = packed(weights)
    types, group = packing.fixed(first, x.shape[-1]) if first else _dense_fixed(call)
    bias = next((c for c in biases or () if c is not None), None)
    segments: list[int] = []
    for i, w in enumerate(weights):
        c = biases[i] if biases else None
        place = 0 if c is None else c.data_ptr()
        segments += packing.segment(w, place) if isinstance(w, Weight) else _segment(w, place)
    return _OP[len(weights)](
        norm.code,
        ACTIVATION[activation],
        DTYPES[x.dtype],
        types[0],
        types[0] if bias is None else DTYPES[bias.dtype],
        0 if gain is None else DTYPES[gain.dtype],
        0 if norm_bias is None else DTYPES[norm_bias.dtype],
        0 if alpha is None else DTYPES[alpha.dtype],
        *types[1:],
        0,
        x.shape[-1],
        group,
        eps,
        offset,
        0 if gain is None else gain.data_ptr(),
        0 if norm_bias is None else norm_bias.data_ptr(),
        0 if alpha is None else alpha.data_ptr(),
        len(weights),
        *segments,
    )


def _dense_fixed(call: Call) -> tuple[tuple[int, int, int, int], int]:
    weights = call.dense_weights()
    return (DTYPES[weights[0].dtype if weights else call.x.dtype], 0, 0, 0), 0


def _segment(weight: Tensor, bias: int) -> tuple[int, ...]:
    stride, step = weight.stride() if turned(weight) else (weight.stride(0), 1)
    return (weight.data_ptr(), bias, weight.shape[0], stride, step, *NO_GRIDS)


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


def run_at(
    dtype: torch.dtype,
    n: int,
    segments: Iterable[int],
    x: int,
    rows: int,
    outputs: Sequence[tuple[int, int]],
) -> None:
    """Products alone, of x [rows, n] dense at an address, where all are parts of larger tensors.

    segments: as in `pack`, so many numbers for each of `outputs`, which are addresses and strides.
    """
    number, count = DTYPES[dtype], len(outputs)
    types = (norms.NONE.code, 0, number, number, number, 0, 0, 0, 0, 0, 0, 0)
    fixed = (*types, n, 0, 0.0, 0.0, 0, 0, 0, count)
    places = [number for output in outputs for number in output]
    call = _CALL[count](x, 0, 0, rows, n, 0, torch.get_num_threads(), *places)
    if _library().run(_OP[count](*fixed, *segments), call):
        raise MemoryError("no memory for the rows of x in float32")


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
    plain = call.norm is norms.NONE and call.gain is None and call.norm_bias is None
    z = x if plain else normalize_packed(pack(call), x, x.new_empty(x.shape))
    found = [
        F.linear(z, w, biases[i] if biases else None) for i, w in enumerate(call.dense_weights())
    ]
    if call.activation:
        found = [gate_(found[0], found[1], call.activation)]
    if call.output_residual is not None:
        found[0] += _rows(call.output_residual)
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
