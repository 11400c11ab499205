"""Attention of one new token: what its kernels take, and the operators of compiled graphs.

    out[b, h] = Σ_t softmax_t(scale · q[b, h]·k[b, g(h), t] + mask[b, t]) v[b, g(h), t]

q: [B, H, 1, D], k: [B, Hkv, T, D], v: [B, Hkv, T, Dv], mask: [B or 1, 1, 1, T]; out: [B, 1, H, Dv].
g(h) = h // (H / Hkv).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm.kernels.weights import DTYPES

SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor[] mask, float scale) -> Tensor"


def unfit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, here: bool, place: str
) -> str | None:
    """Why no kernel takes these, by types, shapes and strides alone; or None.

    here: whether q, k and v are on `place`.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not here:
        return f"q, k and v are not [B, heads, length, width] on {place}"
    dtype = q.dtype
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype:
        return f"q, k and v are not of one of the kernel's dtypes: {dtype}, {k.dtype}, {v.dtype}"
    batch, heads, queries, width = q.shape
    _, groups, length, value_width = v.shape
    if queries != 1:
        return f"q has {queries} tokens; the kernel takes one"
    if k.shape != (batch, groups, length, width) or v.shape[0] != batch:
        return f"q, k and v do not fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
    if not (batch and heads and groups and length and width and value_width) or heads % groups:
        return f"there is nothing to attend to, or {heads} heads are no multiple of {groups}"
    if not (_dense(q) and _dense(k) and _dense(v)):
        return "a row of q, k or v is not dense; .contiguous() has dense ones"
    return None if mask is None else _unfit_mask(mask, q, length, place)


def _unfit_mask(mask: Tensor, q: Tensor, length: int, place: str) -> str | None:
    shape, batch, dtype = mask.shape, q.shape[0], q.dtype
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1:] != (1, 1, length):
        return f"the mask is {list(shape)}; the kernel takes [{batch} or 1, 1, 1, {length}]"
    if mask.dtype not in (torch.bool, dtype) or mask.device != q.device:
        return f"the mask is {mask.dtype} on {mask.device}, not bool or {dtype} on {place}"
    return None


def _dense(x: Tensor) -> bool:
    return x.stride()[3] == 1 or x.shape[3] == 1


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], scale: float) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], v.shape[3]))


def define(name: str, layout: torch.Tag) -> None:
    """Let torch know an operator `name` of SCHEMA, which has no kernel yet.

    layout: what a compiler may do with the strides of its arguments.
    """
    torch.library.define(name, SCHEMA, tags=(torch.Tag.pt2_compliant_tag, layout))
    torch.library.register_fake(name, _fake)
