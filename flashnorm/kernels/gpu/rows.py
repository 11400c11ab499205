"""Steps over whole rows of x, one program each, and over tiles behind a library's product."""

from __future__ import annotations

from torch import Tensor

from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu.launch import row_width, single
from flashnorm.kernels.gpu.step import Step
from flashnorm.kernels.norms import NormKind

ROWS, COLUMNS = 4, 512  # of a tile of the gate


def row_scale_step(x: Tensor, norm: NormKind, eps: float, s: Tensor, mean: Tensor | None) -> Step:
    """x: [rows, n] with dense rows; s, mean: [rows], float32."""
    from flashnorm.kernels.gpu.device.stats import row_scale

    width, warps = row_width(x.shape[1])
    arguments = {
        "x": x,
        "x_stride": x.stride(0),
        "s": s,
        "mean": mean,
        "n": x.shape[1],
        "eps": single(eps),
        "NORM": norm.name,
        "WIDTH": width,
    }
    return Step(row_scale, (x.shape[0],), arguments, warps)


def add_stats_step(
    x: Tensor,
    residual: Tensor,
    total: Tensor,
    norm: NormKind,
    eps: float,
    s: Tensor,
    mean: Tensor | None,
) -> Step:
    """x, residual: [rows, n] with dense rows, total: the same, dense."""
    from flashnorm.kernels.gpu.device.stats import add_stats

    width, warps = row_width(x.shape[1])
    arguments = {
        "x": x,
        "x_stride": x.stride(0),
        "residual": residual,
        "residual_stride": residual.stride(0),
        "total": total,
        "s": s,
        "mean": mean,
        "n": x.shape[1],
        "eps": single(eps),
        "NORM": norm.name,
        "WIDTH": width,
    }
    return Step(add_stats, (x.shape[0],), arguments, warps)


def normalize_step(call: Call, z: Tensor) -> Step:
    """z = norm(x) · (offset + gain) + β. call.x: [rows, n] with dense rows; z: the same, dense."""
    from flashnorm.kernels.gpu.device.stats import normalize

    width, warps = row_width(call.x.shape[1])
    arguments = {
        "x": call.x,
        "x_stride": call.x.stride(0),
        "gain": call.gain,
        "offset": single(call.gain_offset),
        "norm_bias": call.norm_bias,
        "alpha": call.alpha if call.norm.learns_alpha else None,
        "z": z,
        "n": call.x.shape[1],
        "eps": single(call.eps),
        "NORM": call.norm.name,
        "WIDTH": width,
    }
    return Step(normalize, (call.x.shape[0],), arguments, warps)


def gate_step(call: Call, products: list[Tensor], s: Tensor | None, y: Tensor) -> Step:
    """y = act(s a) ⊙ (s b) + residual, or s a + residual; the products have their biases."""
    from flashnorm.kernels.gpu.device.gate import gate

    a, b = products[0], products[-1]
    rows, k = y.shape
    arguments = {
        "a": a,
        "a_stride": a.stride(0),
        "b": b,
        "b_stride": b.stride(0),
        "s": s,
        "residual": call.output_residual,
        "residual_stride": None if call.output_residual is None else call.output_residual.stride(0),
        "y": y,
        "rows": rows,
        "k": k,
        "ACTIVATION": call.activation,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }
    return Step(gate, (-(-rows // ROWS), -(-k // COLUMNS)), arguments, 4)
