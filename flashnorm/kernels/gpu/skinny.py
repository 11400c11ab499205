"""Steps of a call with few rows: one kernel for up to three weights that share x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import counters
from flashnorm.kernels.gpu.launch import Device, Tile, blocks, lines_ahead, single, skinny_tile
from flashnorm.kernels.gpu.step import Step

TOGETHER = 3  # weights that one launch takes


def statistics(call: Call, rows: int) -> str:
    """When the kernel knows the statistics: "none", "first" before the products, or "after" them.

    Afterwards is enough where all that they do is to scale the products. The matrix units take x
    rounded: a float16 x times its gain could be too large for that before it is scaled.
    """
    if not call.norm.scales:
        return "none"
    if call.norm.centers or call.norm_bias is not None:
        return "first"
    risky = rows > 1 and call.gain is not None and call.x.dtype == torch.float16
    return "first" if risky else "after"


def groups(call: Call) -> Iterator[list[int]]:
    """Which weights go into one launch: those of a gate, or up to three that share x.

    A kernel chooses its weight while it runs, so they have to be alike: with a bias or without,
    and of no width that is compiled into the kernel.
    """
    count = len(call.weights)
    biased = {bias is not None for bias in call.biases or (None,)}
    alike = len(biased) == 1 and call.x.shape[1] > 1
    alike = alike and all(w.shape[0] > 1 and w.stride(0) > 1 for w in call.dense_weights())
    together = 2 if call.activation else TOGETHER if alike else 1
    for first in range(0, count, together):
        yield list(range(first, min(count, first + together)))


def default_tile(call: Call, group: Sequence[int], device: Device) -> Tile:
    """The tile of the weights of one launch, where none was measured."""
    n, gated = call.x.shape[-1], call.activation is not None
    widths = [call.weights[i].shape[0] for i in (group[:1] if gated else group)]
    return skinny_tile(call.x.numel() // n, n, widths, call.x.dtype, gated, device)


def steps(
    call: Call, outputs: Sequence[Tensor], device: Device, tile: Tile | None = None
) -> Iterator[Step]:
    """call.x: [rows, n] with dense rows, residual the same; outputs: [rows, k_i], dense."""
    for group in groups(call):
        weights = [call.dense_weights()[i] for i in group]
        biases = [call.biases[i] if call.biases else None for i in group]
        found = [outputs[0]] if call.activation else [outputs[i] for i in group]
        if sum(y.numel() for y in found):
            tile_here = tile or default_tile(call, group, device)
            yield _group(call, weights, biases, found, device, tile_here)


def _group(
    call: Call,
    weights: list[Tensor],
    biases: list[Tensor | None],
    outputs: list[Tensor],
    device: Device,
    tile: Tile,
) -> Step:
    from flashnorm.kernels.gpu.device.skinny import skinny

    programs, arguments = common(call, weights, biases, outputs, device, tile, call.x.shape[1])
    early = device.starts_early
    return Step(skinny, (programs, tile.splits), arguments, tile.warps, tile.stages, early)


def common(
    call: Call,
    values: list[Tensor],
    biases: list[Tensor | None],
    outputs: list[Tensor],
    device: Device,
    tile: Tile,
    taken: int,
) -> tuple[int, dict[str, Any]]:
    """The programs of a launch for each part of n, and what it is given, whatever the format is.

    values: the weights as they lie, rows of `taken` elements.
    """
    (rows, n), gated = call.x.shape, call.activation is not None
    programs = blocks(tile.columns, [y.shape[1] for y in outputs])
    residual, early = call.output_residual, device.starts_early
    lines = lines_ahead(tile, taken, values[0].dtype, gated) if early else 0
    arguments = _weights(values, biases, outputs) | _parts(call.x, tile, programs, 1 + gated)
    return programs, arguments | {
        "x": call.x,
        "x_stride": call.x.stride(0),
        "gain": call.gain,
        "offset": single(call.gain_offset),
        "norm_bias": call.norm_bias,
        "alpha": call.alpha if call.norm.learns_alpha else None,
        "residual": residual,
        "residual_stride": None if residual is None else residual.stride(0),
        "rows": rows,
        "n": n,
        "eps": single(call.eps),
        "NORM": call.norm.name,
        "STATISTICS": statistics(call, tile.rows),
        "ACTIVATION": call.activation,
        "PRECISION": precision(),
        "WEIGHTS": len(values),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "SPLITS": tile.splits,
        "STAGES": tile.stages,
        "PDL": early,
        "LINES": lines,
    }


def _parts(x: Tensor, tile: Tile, tiles: int, products: int) -> dict[str, Any]:
    """Where programs that have a part of n each leave their sums, and count themselves."""
    names = ("partial", "partial_squares", "counters")
    if tile.splits == 1:
        return dict.fromkeys(names)
    programs = tile.splits * tiles
    made = x.new_empty(programs * products * tile.columns * tile.rows, dtype=torch.float32)
    squares = x.new_empty(programs * tile.rows, dtype=torch.float32)
    return dict(zip(names, (made, squares, counters.take(tiles, x.device)), strict=True))


def _weights(
    weights: list[Tensor], biases: list[Tensor | None], outputs: list[Tensor]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i in range(TOGETHER):
        given = i < len(weights)
        y = outputs[i] if i < len(outputs) else None
        found |= {
            f"w{i}": weights[i] if given else None,
            f"w{i}_stride": weights[i].stride(0) if given else None,
            f"bias{i}": biases[i] if given else None,
            f"y{i}": y,
            f"k{i}": None if y is None else y.shape[1],
        }
    return found


def precision() -> str:
    """Of float32 products: TensorFloat-32 only where torch is allowed to use it.

    (`allow_tf32` raises once somebody has chosen by the newer name, which knows both.)
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
