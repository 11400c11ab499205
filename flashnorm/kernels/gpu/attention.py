"""Attention of one new token per sequence on a GPU, in one launch of `device.attention.attend`.

    out[b, h] = Σ_t softmax_t(scale · q[b, h]·k[b, g(h), t] + mask[b, t]) v[b, g(h), t]

g(h) = h // (H / Hkv). Scores, softmax and sums are float32; out is rounded once. Keys and values of
a head are read once for all query heads that share it, as they lie. Positions that a bool mask
hides, or that -inf is added to, are not read; where that is all of them, out is zero, as torch has
it. The least number of a dtype, which some models add in order to hide, hides nothing by itself:
torch adds it to a score, and so does the kernel.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels import attention
from flashnorm.kernels.fallback import fell_back
from flashnorm.kernels.gpu import counters, ways
from flashnorm.kernels.gpu.launch import Device, device_of, power_of_two, single
from flashnorm.kernels.gpu.skinny import precision
from flashnorm.kernels.gpu.step import Step, execute

OPERATOR = "flashnorm::attend_gpu"
WIDEST = 512  # features of a head: the sums of 16 heads are in registers
MOST_STRIDE = 2**31  # of the mask, whose stride is not compiled into the kernel
MOST_ROW = 2**24  # from a row of k or v to the next: a block of them is addressed by 32 bits
TOGETHER = 16  # heads that the matrix units take at a time
SCANNED = 1024  # positions of the mask that are looked at before the loop, at a time
WAVES = 2  # programs per multiprocessor: one loads where the other computes
JOINED = 2048  # numbers of all splits that are added up at a time
PARTS = 2**16  # numbers that the last program has to read at most, unless that is a few splits


@dataclass(frozen=True)
class Cut:
    """One program's share: heads (1, or up to 16), positions and features of k at a time."""

    heads: int
    positions: int
    depth: int
    warps: int
    stages: int


def cut_for(heads: int, width: int, value_width: int, dtype: torch.dtype) -> Cut:
    """heads: those that share keys and values.

    What is loaded at a time is at most 16 KB of k and as much of v, and less where registers would
    spill otherwise (read off what it compiles to). float32 is multiplied from registers.
    """
    wide = power_of_two(max(width, value_width), 16)
    if heads == 1:
        half = dtype != torch.float32
        numbers = 4096 if half and wide <= 128 else 1024
        positions = min(max(numbers // wide, 4), 64)
        return Cut(1, positions, power_of_two(width, 16), 8 if half else 4, 2)
    if dtype == torch.float32:
        depth = min(power_of_two(width, 16), 32)
        return Cut(TOGETHER, 16, depth, 8 if wide > 64 else 4, 2 if wide > 128 else 1)
    positions = min(8192 // wide, 64) if wide <= 128 else 16
    depth, warps = min(power_of_two(width, 16), 256), 8 if wide > 64 else 4
    return Cut(TOGETHER, positions, depth, warps, 2)


def splits_for(shares: int, length: int, numbers: int, cut: Cut, device: Device) -> int:
    """Parts of the positions, so that there are `WAVES` programs for every multiprocessor.

    shares: programs without splits; numbers: of the sums of one of them.
    """
    blocks = -(-length // cut.positions)
    wanted = -(-WAVES * device.processors // shares)
    return max(1, min(blocks, wanted, max(8, PARTS // numbers)))


def unfit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """Why the kernel cannot take these where there are kernels, by types, shapes and strides."""
    here = q.device == k.device == v.device
    if reason := attention.unfit(q, k, v, mask, here, f"one device ({q.device})"):
        return reason
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST:
        return f"heads have {widest} features; the kernel takes {WIDEST} at most"
    row = max(k.stride(2), v.stride(2))
    if row > MOST_ROW:
        return f"a row of k or v is {row} numbers from the next; the kernel takes {MOST_ROW}"
    if mask is not None and mask.stride(0) >= MOST_STRIDE:
        return f"the mask of the next sequence is {mask.stride(0)} numbers away"
    return None


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    device: Device,
    splits: int | None = None,
) -> Step:
    """The launch for arguments that `unfit` has nothing against. out: [B, 1, H, Dv], dense."""
    from flashnorm.kernels.gpu.device import attention as kernels

    batch, heads, _, width = q.shape
    _, groups, length, value_width = v.shape
    shared = heads // groups
    cut = cut_for(shared, width, value_width, q.dtype)
    kept, wide = min(power_of_two(shared), cut.heads), power_of_two(value_width, 16)
    shares = batch * groups * -(-shared // cut.heads)
    if splits is None:
        splits = splits_for(shares, length, kept * wide, cut, device)
    programs = shares * splits
    early = device.starts_early
    arguments = {
        "q": q,
        "q_batch": q.stride(0),
        "q_head": q.stride(1),
        "k": k,
        "k_batch": k.stride(0),
        "k_head": k.stride(1),
        "k_row": k.stride(2),
        "v": v,
        "v_batch": v.stride(0),
        "v_head": v.stride(1),
        "v_row": v.stride(2),
        "mask": mask,
        "mask_batch": 0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        "mask_step": 0 if mask is None else mask.stride(3),
        "out": out,
        "parts": q.new_empty(programs * kept * (wide + 2), dtype=torch.float32),
        "counters": counters.take(shares if splits > 1 else 1, q.device),
        "scale": single(scale),
        "groups": groups,
        "length": length,
        "splits": splits,
        "MASK": _kind_of_mask(mask),
        "HEADS": shared,
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "ROWS": cut.heads,
        "KEPT": kept,
        "POSITIONS": cut.positions,
        "DEPTH": cut.depth,
        "WIDE": wide,
        "SCANNED": max(1, SCANNED // cut.positions),
        "JOINED": max(1, JOINED // (kept * wide)),
        "PRECISION": precision(),
        "STAGES": cut.stages,
        "PDL": early,
    }
    return Step(kernels.attend, (programs,), arguments, cut.warps, cut.stages, early)


def _kind_of_mask(mask: Tensor | None) -> str:
    if mask is None:
        return "absent"
    return "bool" if mask.dtype == torch.bool else "added"


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The equation above, for arguments that `unfit` has nothing against.

    q: [B, H, 1, D], k: [B, Hkv, T, D], v: [B, Hkv, T, Dv], of one dtype (float32, bfloat16,
    float16), with any strides but dense rows; mask: [B or 1, 1, 1, T], bool (False hides) or of
    that dtype (added to the scores). Returns [B, 1, H, Dv], contiguous. The same call gives the
    same bits.
    """
    out = q.new_empty((q.shape[0], 1, q.shape[1], v.shape[3]))
    with torch.cuda.device_of(q):
        execute([attention_step(q, k, v, mask, scale, out, device_of(q))])
    return out


def kind(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Hashable:
    """What the code that runs depends on, and nothing that changes with every new token.

    Triton compiles a kernel for constants, and for numbers and addresses that 16 divides, numbers
    that are 1, and those beyond 32 bits.
    """
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    return (
        q.device,
        q.shape[1:2],
        k.shape[1:2],
        q.shape[-1],
        v.shape[-1],
        precision(),
        *[(t.dtype, t.data_ptr() % 16, _kinds_of(t.stride())) for t in tensors],
    )


def _kinds_of(strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([1 if s == 1 else 2 if s >= 2**31 else 3 if s % 16 else 4 for s in strides])


def _run(q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], scale: float) -> Tensor:
    given = mask[0] if mask else None
    if reason := ways.unusable(q):
        fell_back(reason)
        y = F.scaled_dot_product_attention(q, k, v, given, scale=scale, enable_gqa=True)
        return y.transpose(1, 2).contiguous()
    return attend(_dense_rows(q), _dense_rows(k), _dense_rows(v), scale, given)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


# Of any strides: a mask that is one row for all heads would be copied for each layer.
attention.define(OPERATOR, torch.Tag.flexible_layout)
torch.library.impl(OPERATOR, "CompositeExplicitAutograd", _run)


def attend_in_graph(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`attend` as an operator that a compiled graph calls."""
    return torch.ops.flashnorm.attend_gpu(q, k, v, [] if mask is None else [mask], scale)
