"""bitsandbytes: linear layers of four bits, NF4 and FP4, as Linear4bit holds them.

    W = table[q] · absmax,   absmax of `blocksize` features in a row

Two q in a byte, the even feature in the high half. With nested statistics absmax is held in 8 bits,
`table8[a] · absmax₂ + offset`, and is made once, in float32: a number for each block.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.kernels.formats.codebook import CODEBOOK4
from flashnorm.kernels.weights import HALVES, Weight
from flashnorm.quantized import layout
from flashnorm.quantized.layout import Held, Unreadable

EIGHT = "bitsandbytes quantizes what it multiplies as well (Linear8bitLt): it runs its own code"
UNSETTLED = "bitsandbytes has not quantized its weight yet: move the model to its device first"
REPACKED = (
    "bitsandbytes has packed its weight anew for a product of its own, at its first call: "
    "accelerate_ before the model runs, or model.state_dict() first, which packs it back"
)
SETTLES = frozenset({"compute_dtype", "compute_type_is_set"})
WEIGHT = "weight"


@layout.register
def _layout(module: Any) -> Held | str | None:
    library = sys.modules.get("bitsandbytes")
    if library is None or not isinstance(module, nn.Module):
        return None
    if isinstance(module, library.nn.Linear8bitLt):
        return EIGHT
    four = library.nn.Linear4bit
    if not isinstance(module, four) or type(module).forward is not four.forward:
        return None
    try:
        weight = _read(module)
    except Unreadable as error:
        return str(error)
    if reason := weight.unfit():
        return reason
    state: Any = _state(module)
    nested = ", nested" if state.nested else ""
    origin = f"bitsandbytes, {state.quant_type}, a scale for {state.blocksize} features{nested}"
    bias = "" if module.bias is None else "bias"
    dtypes = _dtypes(module.compute_dtype)
    return Held(origin, WEIGHT, bias, _tensors, _read, dtypes, _rounds(module), settles=SETTLES)


def _dtypes(compute: torch.dtype | None) -> tuple[torch.dtype, ...] | None:
    """The dtypes of x that a module does not round: it computes in this one, or in that of x."""
    if compute is None or compute == torch.float32:
        return None
    return (compute,) if compute in HALVES else ()


def _rounds(module: Any) -> torch.dtype | None:
    """On processors with such instructions its own code multiplies in bfloat16, whatever x is."""
    fast = (
        getattr(module, "support_avx512bf16_for_cpu", False) and module.weight.device.type == "cpu"
    )
    return torch.bfloat16 if fast else None


def _state(module: nn.Module) -> Any:
    """What the weight was quantized to, which a wrapped parameter may have lost."""
    held: Any = module._parameters[WEIGHT]
    found = vars(held).get("quant_state")
    return module.__dict__.get("quant_state") if found is None else found


def _tensors(module: nn.Module) -> Sequence[Tensor]:
    state, weight = _state(module), module._parameters[WEIGHT]
    if weight is None:
        raise KeyError(WEIGHT)
    found = [weight, state.absmax, state.code]
    return [*found, state.state2.absmax, state.state2.code, state.offset] if state.nested else found


def _read(module: Any) -> Weight:
    """W over the module's bytes."""
    state, weight = _state(module), module._parameters[WEIGHT]
    if state is None or weight is None or weight.is_meta:
        raise Unreadable(UNSETTLED)
    if getattr(state, "packing_format_for_cpu", False):
        raise Unreadable(REPACKED)
    shape, block = tuple(state.shape), state.blocksize
    if shape != (module.out_features, module.in_features):
        raise Unreadable(f"its weight was quantized as {list(shape)}, not as [out, in]")
    k, n = shape
    if n % block:
        raise Unreadable(f"blocks of {block} numbers do not divide its {n} features")
    values = layout.plain(weight).reshape(-1).view(torch.uint8)
    if values.numel() != k * n // 2:
        raise Unreadable(f"its weight has {values.numel()} bytes, for {k} x {n} numbers")
    return Weight(
        values.view(k, n // 2),
        CODEBOOK4,
        _absmax(state).view(k, n // block),
        k,
        n,
        block,
        table=layout.made_of([state.code], state.code.float),
    )


def _absmax(state: Any) -> Tensor:
    if not state.nested:
        return state.absmax
    parts = (state.absmax, state.state2.absmax, state.state2.code, state.offset)
    return layout.made_of(parts, lambda: _unnested(state))


def _unnested(state: Any) -> Tensor:
    inner = state.state2
    scales = inner.absmax.float().repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    return inner.code.float()[state.absmax.reshape(-1).long()] * scales + state.offset.float()
