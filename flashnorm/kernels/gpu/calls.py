"""Run a call, or the norm's part of one, on the device that holds x."""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm.errors import FlashNormError
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import gemm, matmul, rows, skinny
from flashnorm.kernels.gpu.launch import MOST_ROWS, device_of
from flashnorm.kernels.gpu.step import execute
from flashnorm.kernels.gpu.ways import choose, tile_for


def run(call: Call, way: str | None = None) -> list[Tensor]:
    """The operation of `reference.norm_linear`, for a call that `why_not` has nothing against.

    way: "skinny" (up to 64 rows), "gemm" or "matmul" instead of the one that `choose` names. Raises
    FlashNormError for a way that cannot take the call.
    """
    lead = call.x.shape[:-1]
    flat = call._replace(
        x=dense_rows(call.x), residual=None if call.residual is None else dense_rows(call.residual)
    )
    count = flat.x.shape[0]
    if way is None:
        way = choose(call).way
    if way not in ("skinny", "gemm", "matmul"):
        raise FlashNormError(f"there is no way {way!r}; the ways are skinny, gemm and matmul")
    if way == "skinny" and count > MOST_ROWS:
        raise FlashNormError(f"x has {count} rows; the skinny kernel takes {MOST_ROWS} at most")
    with torch.cuda.device_of(call.x):
        found = _results(flat, way)
    return [y.view(*lead, y.shape[1]) for y in found]


def _results(flat: Call, way: str) -> list[Tensor]:
    x, weights = flat.x, flat.weights[:1] if flat.activation else flat.weights
    empty = not x.shape[0]
    if way == "matmul" and not empty:
        return matmul.run(flat)
    outputs = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    if not empty:
        make = skinny.steps if way == "skinny" else gemm.steps
        execute(make(flat, outputs, device_of(x), tile_for(flat, way)))
    return outputs


def dense_rows(x: Tensor) -> Tensor:
    """x as [rows, n] with dense rows, copied only where its strides make it necessary."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_scale(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor | None]:
    """`s = 1/√(mean(x²) + ε)`, or of the variance, and the mean of a "layer" norm: [rows], float32.

    x: [.., n], read once. The rows of x are those of `x.reshape(-1, n)`.
    """
    x = dense_rows(x)
    s, mean = _statistics_of(x, norm)
    if x.shape[0]:
        with torch.cuda.device_of(x):
            execute([rows.row_scale_step(x, norm, eps, s, mean)])
    return s, mean


def add_stats(
    x: Tensor, residual: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + residual in their dtype, and `row_scale` of that, in one pass. Both [.., n]."""
    flat, added = dense_rows(x), dense_rows(residual)
    total = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    s, mean = _statistics_of(flat, norm)
    if flat.shape[0]:
        with torch.cuda.device_of(x):
            execute([rows.add_stats_step(flat, added, total, norm, eps, s, mean)])
    return total.view(x.shape), s, mean


def _statistics_of(x: Tensor, norm: str) -> tuple[Tensor, Tensor | None]:
    if norm not in ("rms", "layer"):
        raise FlashNormError(f"norm {norm!r} has no statistics; rms and layer have")
    s = x.new_empty(x.shape[0], dtype=torch.float32)
    return s, torch.empty_like(s) if norm == "layer" else None


def normalize(
    x: Tensor,
    norm: str = "rms",
    eps: float = 1e-6,
    *,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    norm_bias: Tensor | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    """`norm(x) · (offset + gain) + β`, in the dtype and shape of x [.., n], rounded once."""
    flat = dense_rows(x)
    call = Call(flat, (), None, norm, eps, gain, gain_offset, norm_bias, alpha)
    z = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        with torch.cuda.device_of(x):
            execute([rows.normalize_step(call, z)])
    return z.view(x.shape)
