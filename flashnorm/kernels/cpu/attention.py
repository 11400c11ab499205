"""Attention of one new token per sequence, on the CPU: the step of generation.

    out[b, h] = Σ_t softmax_t(scale · q[b, h]·k[b, g(h), t] + mask[b, t]) v[b, g(h), t]

g(h) = h // (H / Hkv): heads in groups share their keys and values, each of which is read once. All
of it is in float32; out is rounded once. Positions that a mask hides before the first and behind
the last visible one are not read; where it hides all of them, out is zero, as torch has it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from flashnorm.kernels import attention
from flashnorm.kernels.cpu.library import Library, load
from flashnorm.kernels.weights import BOOLEAN, DTYPES

_ATTEND = struct.Struct("2i21qdq").pack


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """Why the kernel cannot take these arguments of `attend`, or None where it can."""
    library = load()
    return library if isinstance(library, str) else unfit(q, k, v, mask)


def unfit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """The same where there are kernels: by types, shapes and strides alone."""
    here = q.is_cpu and k.is_cpu and v.is_cpu
    return attention.unfit(q, k, v, mask, here, "the CPU")


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The equation above, for arguments that `why_not` has nothing against.

    q: [B, H, 1, D], k: [B, Hkv, T, D], v: [B, Hkv, T, Dv], of one dtype, with any strides but dense
    rows; mask: [B or 1, 1, 1, T], bool (False hides) or of that dtype (added to the scores).
    Returns [B, 1, H, Dv], contiguous. Raises MemoryError where there is none for the scores.
    """
    batch, heads, _, width = q.shape
    _, groups, length, value_width = v.shape
    dtype = q.dtype
    out = q.new_empty((batch, 1, heads, value_width))
    number = hiding = DTYPES[dtype]
    place = mask_batch = mask_step = 0
    if mask is not None:
        place = mask.data_ptr()
        mask_batch, _, _, mask_step = mask.stride()
        if mask.shape[0] == 1:
            mask_batch = 0
        if mask.dtype == torch.bool:
            hiding = BOOLEAN
    q_batch, q_head, _, _ = q.stride()
    k_batch, k_head, k_row, _ = k.stride()
    v_batch, v_head, v_row, _ = v.stride()
    packed = _ATTEND(
        number,
        hiding,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        place,
        out.data_ptr(),
        batch,
        heads,
        groups,
        length,
        width,
        value_width,
        q_batch,
        q_head,
        k_batch,
        k_head,
        k_row,
        v_batch,
        v_head,
        v_row,
        mask_batch,
        mask_step,
        scale,
        torch.get_num_threads(),
    )
    library = load()
    assert isinstance(library, Library)
    if library.attend(packed):
        raise MemoryError("no memory for the scores of a group of heads")
    return out
