"""Steps of a call with many rows as a tiled product; what its epilogue cannot do comes before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashnorm.kernels import norms
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu.launch import GROUP, Device, Tile, gemm_tile
from flashnorm.kernels.gpu.rows import add_stats_step, normalize_step, row_scale_step
from flashnorm.kernels.gpu.skinny import precision
from flashnorm.kernels.gpu.step import Step


def only_scales(call: Call) -> bool:
    """Whether the norm is one factor per row: an RMSNorm whose gain is in the weight."""
    return call.norm is norms.RMS and call.gain is None and call.norm_bias is None


def as_it_is(call: Call) -> bool:
    """Whether x is multiplied as it came."""
    return call.norm is norms.NONE and call.gain is None and call.norm_bias is None


def scaled_rows(call: Call) -> tuple[Tensor, Tensor, Step]:
    """What is multiplied, the scales of its rows, and the pass that makes both.

    x is read only; of x + r the pass that adds them takes the statistics as well.
    """
    x, r = call.x, call.input_residual
    s = x.new_empty(x.shape[0], dtype=torch.float32)
    if r is None:
        return x, s, row_scale_step(x, norms.RMS, call.eps, s, None)
    total = x.new_empty(x.shape)
    return total, s, add_stats_step(x, r, total, norms.RMS, call.eps, s, None)


def steps(
    call: Call, outputs: Sequence[Tensor], device: Device, tile: Tile | None = None
) -> Iterator[Step]:
    """call.x: [rows, n] with dense rows, residual the same; outputs: [rows, k_i], dense.

    A LayerNorm takes its mean off x and not, as `μ u`, off the product: no digit is lost by that.
    """
    s = None
    if only_scales(call):
        x, s, step = scaled_rows(call)
        yield step
    else:
        call = call.added()
        x = call.x
        if not as_it_is(call):
            x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            yield normalize_step(call, x)
    for i, y in enumerate(outputs):
        if y.numel():
            yield _product(call, x, s, i, y, device, tile)


def _product(
    call: Call, x: Tensor, s: Tensor | None, i: int, y: Tensor, device: Device, tile: Tile | None
) -> Step:
    from flashnorm.kernels.gpu.device.gemm import gemm

    (rows, k), gated = y.shape, call.activation is not None
    residual = call.output_residual
    tile = tile or gemm_tile(rows, k, x.dtype, gated, device, residual is not None)
    weights, biases = call.dense_weights(), call.biases or [None] * len(call.weights)
    second = weights[1] if gated else None
    arguments = {
        "x": x,
        "x_stride": x.stride(0),
        "s": s,
        "w0": weights[i],
        "w0_stride": weights[i].stride(0),
        "bias0": biases[i],
        "w1": second,
        "w1_stride": None if second is None else second.stride(0),
        "bias1": biases[1] if gated else None,
        "residual": residual,
        "residual_stride": None if residual is None else residual.stride(0),
        "y": y,
        "rows": rows,
        "n": x.shape[1],
        "k": k,
        "ACTIVATION": call.activation,
        "PRECISION": precision(),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": GROUP,
    }
    blocks = -(-rows // tile.rows) * -(-k // tile.columns)
    return Step(gemm, (blocks,), arguments, tile.warps, tile.stages)
