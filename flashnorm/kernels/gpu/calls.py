"""Run a call, or the norm's part of one, on the device that holds x."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flashnorm.errors import FlashNormError
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import gemm, matmul, packed, rows, skinny
from flashnorm.kernels.gpu.launch import MOST_ROWS, blocks, device_of
from flashnorm.kernels.gpu.step import Step, execute
from flashnorm.kernels.gpu.ways import choose, tile_for
from flashnorm.kernels.norms import NormKind
from flashnorm.kernels.weights import packed as first_packed


def run(call: Call, way: str | None = None) -> list[Tensor]:
    """The operation of `reference.norm_linear`, for a call that `why_not` has nothing against.

    way: "skinny" (up to 64 rows), "gemm" or "matmul" instead of the one that `choose` names. Raises
    FlashNormError for a way that cannot take the call.
    """
    lead = call.x.shape[:-1]
    if way is None:
        way = choose(call).way
    if way == "skinny":
        call = call.added()  # the others add while they take the statistics
    before, behind = call.input_residual, call.output_residual
    flat = call._replace(
        x=dense_rows(call.x),
        input_residual=None if before is None else dense_rows(before),
        output_residual=None if behind is None else dense_rows(behind),
    )
    count = flat.x.shape[0]
    if way not in ("skinny", "gemm", "matmul"):
        raise FlashNormError(f"there is no way {way!r}; the ways are skinny, gemm and matmul")
    if way == "skinny" and count > MOST_ROWS:
        raise FlashNormError(f"x has {count} rows; the skinny kernel takes {MOST_ROWS} at most")
    if way != "skinny" and first_packed(call.weights):
        raise FlashNormError(f"the way {way!r} takes dense weights only; packed ones have skinny")
    with torch.cuda.device_of(call.x):
        found = _results(flat, way)
    return [y.view(*lead, y.shape[1]) for y in found]


def _results(flat: Call, way: str) -> list[Tensor]:
    x, weights = flat.x, flat.results()
    empty = not x.shape[0]
    if way == "matmul" and not empty:
        return matmul.run(flat)
    outputs = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    if not empty:
        made = _steps(way, flat)(flat, outputs, device_of(x), tile_for(flat, way))
        execute(made)
    return outputs


def _steps(way: str, call: Call) -> Callable[..., Iterator[Step]]:
    if way == "gemm":
        return gemm.steps
    return packed.steps if first_packed(call.weights) else skinny.steps


def explain(call: Call) -> str:
    """The way of a call that `why_not` has nothing against, why, and how it is run there."""
    way = choose(call)
    said = f"{way.way}: {way.reason}"
    if way.way == "skinny":
        return f"{said}; {_launches(call)}"
    weights, biases = call.dense_weights(), [bias for bias in call.biases or () if bias is not None]
    several = way.way == "matmul" and len(weights) > 1
    if several and matmul.as_one(weights, biases):
        return f"{said}; the weights lie side by side and are one product"
    return said


def _launches(call: Call) -> str:
    """How the skinny kernel is cut into programs, launch by launch."""
    device, gated, found = device_of(call.x), call.activation is not None, []
    own = packed if first_packed(call.weights) else skinny
    for group in own.groups(call):
        widths = [call.weights[i].shape[0] for i in (group[:1] if gated else group)]
        tile = tile_for(call, "skinny") or own.default_tile(call, group, device)
        programs = blocks(tile.columns, widths) * tile.splits
        parts = f", n in {tile.splits} parts" if tile.splits > 1 else ""
        found.append(f"{programs} programs of {tile.columns} columns{parts}")
    early = " that start before the kernel in front ends" if device.starts_early else ""
    return f"{' and '.join(found)}{early}"


def dense_rows(x: Tensor) -> Tensor:
    """x as [rows, n] with dense rows, copied only where its strides make it necessary."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_scale(x: Tensor, norm: NormKind, eps: float) -> tuple[Tensor, Tensor | None]:
    """`s = 1/√(mean(x²) + ε)`, or of the variance, and the mean where the norm centers.

    Both [rows], float32. x: [.., n], read once. The rows of x are those of `x.reshape(-1, n)`.
    """
    x = dense_rows(x)
    s, mean = _statistics_of(x, norm)
    if x.shape[0]:
        with torch.cuda.device_of(x):
            execute([rows.row_scale_step(x, norm, eps, s, mean)])
    return s, mean


def add_stats(
    x: Tensor, residual: Tensor, norm: NormKind, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + residual in their dtype, and `row_scale` of that, in one pass. Both [.., n]."""
    flat, added = dense_rows(x), dense_rows(residual)
    total = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    s, mean = _statistics_of(flat, norm)
    if flat.shape[0]:
        with torch.cuda.device_of(x):
            execute([rows.add_stats_step(flat, added, total, norm, eps, s, mean)])
    return total.view(x.shape), s, mean


def _statistics_of(x: Tensor, norm: NormKind) -> tuple[Tensor, Tensor | None]:
    if not norm.scales or norm.code is None:
        raise FlashNormError(f"norm {norm.name!r} has no statistics that the kernels know")
    s = x.new_empty(x.shape[0], dtype=torch.float32)
    return s, torch.empty_like(s) if norm.centers else None


def normalize(call: Call) -> Tensor:
    """`norm(x) · (offset + gain) + β`, in the dtype and shape of x [.., n], rounded once."""
    x = call.x
    flat = dense_rows(x)
    call = call._replace(x=flat)
    z = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        with torch.cuda.device_of(x):
            execute([rows.normalize_step(call, z)])
    return z.view(x.shape)
