"""GPTQ and AWQ: four bits in words of 32, held as [in, out], with scales and zeros for groups.

    W[j, i] = (q − zero) · scale

By what a module holds: `qweight`, `qzeros`, `scales`, and for GPTQ `g_idx`, as gptqmodel's linear
layers do. Zeros are held in four bits too; they are made whole once, one byte for each group of an
output. GPTQ's files hold zero − 1 ("v1"): gptqmodel adds it as it loads them, for modules that read
them as they are ("v2"), and says so in `qzero_format`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.kernels.formats.columns import AWQ4, AWQ_ORDER, EACH, GPTQ4
from flashnorm.kernels.weights import HALVES, Weight
from flashnorm.quantized import layout
from flashnorm.quantized.layout import Held, Unreadable

WEIGHT, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
BITS = 4
ACT_ORDER = (
    "its groups are in the order of the activations (act-order, desc_act): features that share a "
    "scale do not lie in a row"
)
ADDS = "it does more than its product: {} is set"
# Attributes of a module that change x or the result.
MORE = ("adapter", "online_full_had")


@layout.register
def _layout(module: Any) -> Held | str | None:
    held: dict[str, Any] = module._buffers if WEIGHT in module._buffers else module._parameters
    if any(held.get(name) is None for name in (WEIGHT, ZEROS, SCALES)):
        return None
    if getattr(module, "bits", None) != BITS:
        return f"it has {getattr(module, 'bits', 'an unknown number of')} bits, not {BITS}"
    for name in MORE:
        if getattr(module, name, None):
            return ADDS.format(name)
    try:
        weight = _read(module)
    except Unreadable as error:
        return str(error)
    if reason := weight.unfit():
        return reason
    word = "GPTQ" if weight.format is GPTQ4 else "AWQ"
    bias = "" if getattr(module, "bias", None) is None else "bias"
    origin = f"{word}, int4, a scale for {weight.group} features"
    # gptqmodel's layers for AWQ compute float32 in float16.
    return Held(origin, WEIGHT, bias, _tensors, _read, None if word == "GPTQ" else HALVES)


def _tensors(module: nn.Module) -> Sequence[Tensor]:
    held = module._buffers if WEIGHT in module._buffers else module._parameters
    words, scales, zeros, order = held[WEIGHT], held[SCALES], held[ZEROS], held.get(GROUPS)
    if words is None or scales is None or zeros is None:
        raise KeyError(WEIGHT)
    return (words, scales, zeros) if order is None else (words, scales, zeros, order)


def _read(module: Any) -> Weight:
    """W over the module's words."""
    words, scales, zeros, *order = _tensors(module)
    k, n = module.out_features, module.in_features
    groups = scales.shape[0]
    if n % groups or scales.shape[1] != k or words.dtype != torch.int32:
        raise Unreadable(f"scales are {list(scales.shape)}, for [{k}, {n}]")
    group = n // groups
    plain = torch.arange(n, device=words.device) // group
    if order and not torch.equal(order[0][:n].to(plain), plain):
        raise Unreadable(ACT_ORDER)
    if words.shape == (n // EACH, k):
        made, raised = GPTQ4, _raised(module)
        whole = layout.made_of([zeros], lambda: _bytes(_unpacked(zeros)[:, :k] + raised), raised)
    elif words.shape == (n, k // EACH):
        place = torch.tensor(AWQ_ORDER, device=words.device).argsort()
        made = AWQ4
        whole = layout.made_of([zeros], lambda: _bytes(_unpacked(zeros, place)))
    else:
        raise Unreadable(f"words are {list(words.shape)}, for [{k}, {n}]")
    if whole.shape != scales.T.shape:
        raise Unreadable(f"zeros are {list(whole.shape)}, scales {list(scales.T.shape)}")
    return Weight(words, made, scales.T, k, n, group, whole)


def _bytes(zeros: Tensor) -> Tensor:
    """[k, groups] int8 of [groups, k]."""
    return zeros.to(torch.int8).T.contiguous()


def _unpacked(words: Tensor, place: Tensor | None = None) -> Tensor:
    """[groups, k] numbers of [groups, k / 8] words, the lowest bits first."""
    found = torch.stack([(words >> BITS * i) & 15 for i in range(EACH)], -1)
    return (found if place is None else found[..., place]).flatten(1)


def _raised(module: Any) -> int:
    """What is added to the zeros that a module holds: one where they are those of a file."""
    asked = getattr(module, "qzero_format", None)
    return 1 if callable(asked) and asked() == 1 else 0
