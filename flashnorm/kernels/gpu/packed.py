"""Steps of a call with few rows and packed weights: one kernel for up to three that share x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, cast

from torch import Tensor

from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu.decoding import (
    alike,
    group_of,
    kind_of,
    values_of,
    zeros_come_off,
)
from flashnorm.kernels.gpu.launch import Device, Tile, packed_tile
from flashnorm.kernels.gpu.skinny import TOGETHER, common
from flashnorm.kernels.gpu.step import Step
from flashnorm.kernels.weights import Weight

NUMBERS = ("scales", "zeros", "offsets")


def weights_of(call: Call) -> Sequence[Weight]:
    """The weights of a call that has packed ones only."""
    return cast("Sequence[Weight]", call.weights)


def groups(call: Call) -> Iterator[list[int]]:
    """Which weights go into one launch: those of a gate, or up to three alike that share x."""
    weights = weights_of(call)
    if call.activation:
        yield [0, 1]
        return
    biases = call.biases or [None] * len(weights)

    def key(i: int) -> tuple[Any, ...]:
        weight = weights[i]
        # A kernel chooses its weight while it runs: none of a width that is compiled into it.
        alone = i if min(weight.outputs, weight.values.stride(0)) <= 1 else -1
        return (*alike(weight), biases[i] is None, alone)

    for _, same in groupby(range(len(weights)), key):
        found = list(same)
        for first in range(0, len(found), TOGETHER):
            yield found[first : first + TOGETHER]


def default_tile(call: Call, group: Sequence[int], device: Device) -> Tile:
    """The tile of the weights of one launch, where none was measured."""
    weights, gated = weights_of(call), call.activation is not None
    first, n = weights[group[0]], call.x.shape[-1]
    widths = [weights[i].outputs for i in (group[:1] if gated else group)]
    rows, dtype = call.x.numel() // n, call.x.dtype
    each, share = kind_of(first).each, group_of(first)
    return packed_tile(rows, n, widths, dtype, each, share, gated, device)


def steps(
    call: Call, outputs: Sequence[Tensor], device: Device, tile: Tile | None = None
) -> Iterator[Step]:
    """call.x: [rows, n] with dense rows, residual the same; outputs: [rows, k_i], dense."""
    for group in groups(call):
        found = [outputs[0]] if call.activation else [outputs[i] for i in group]
        if sum(y.numel() for y in found):
            yield _group(call, group, found, device, tile or default_tile(call, group, device))


def _group(
    call: Call, group: Sequence[int], outputs: list[Tensor], device: Device, tile: Tile
) -> Step:
    from flashnorm.kernels.gpu.device.packed import packed

    weights = [weights_of(call)[i] for i in group]
    values = [values_of(weight, device) for weight in weights]
    biases = [call.biases[i] if call.biases else None for i in group]
    first = weights[0]
    taken = -(-first.features // kind_of(first).each)
    programs, arguments = common(call, values, biases, outputs, device, tile, taken)
    for i in range(TOGETHER):
        for name in NUMBERS:
            part = getattr(weights[i], name) if i < len(weights) else None
            arguments |= {
                f"{name}{i}": part,
                f"{name}{i}_row": None if part is None else part.stride(0),
                f"{name}{i}_group": None if part is None else part.stride(1),
            }
    arguments |= {
        "taken": taken,
        "FORMAT": kind_of(first).name,
        "ZEROS": zeros_come_off(first, tile.rows),
        "GROUP": group_of(first),
    }
    early = device.starts_early
    return Step(packed, (programs, tile.splits), arguments, tile.warps, tile.stages, early)
