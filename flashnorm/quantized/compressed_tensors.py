"""compressed-tensors: linear layers that still hold their weight compressed.

    W = (q − zero) · scale,   q int8 or float8_e4m3fn [k, n], or four bits, two in a byte

Such a layer does not multiply by itself: a hook of the model unpacks all of them at the first call,
after which they are dense. Where the kernels read them that hook is set aside, and a call that no
kernel takes unpacks the one weight for it, as the library would.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.kernels.formats.groups import INT4_GROUPS, INT8_GROUPS, nibbles
from flashnorm.kernels.formats.rows import FP8_ROWS, INT8_ROWS
from flashnorm.kernels.weights import FP8, INT8, Weight, WeightFormat
from flashnorm.quantized import layout
from flashnorm.quantized.layout import Held, Unpacking, Unreadable

LIBRARY = "compressed_tensors"
ACTIVATIONS = (
    "compressed-tensors quantizes what it multiplies as well, or its result: it runs its own code"
)
UNPACKED = "compressed-tensors has unpacked its weight"
PACKED, PLAIN, SCALE, ZERO, ORDER = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
)
HOOK = "ct_decompress_hook"


def is_compressed(module: nn.Module) -> bool:
    """Whether a layer holds its weight compressed, as the library says."""
    status = getattr(module, "quantization_status", None)
    return getattr(status, "value", None) == "compressed"


@layout.register
def _layout(module: Any) -> Held | str | None:
    if LIBRARY not in sys.modules or not isinstance(module, nn.Linear):
        return None
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None or scheme.weights is None or not is_compressed(module):
        return None
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return ACTIVATIONS
    try:
        weight = _read(module)
    except (KeyError, Unreadable) as error:
        return str(error)
    if reason := weight.unfit():
        return reason
    word = {INT4_GROUPS: "int4", FP8_ROWS: "float8"}.get(weight.format, "int8")
    scales = f"a scale for {weight.group} features" if weight.group else "a scale per row"
    origin = f"{LIBRARY.replace('_', '-')}, {word}, {scales}"
    name = PACKED if PACKED in module._parameters else PLAIN
    bias = "" if module._parameters.get("bias") is None else "bias"
    # What is unpacked is multiplied in the dtype of its scales.
    assert weight.scales is not None
    dtypes = (weight.scales.dtype,)
    return Held(origin, name, bias, _tensors, _read, dtypes, None, own, is_own)


def is_own(forward: Any) -> bool:
    """Whether a forward is the one that the library puts on its layers."""
    function = getattr(forward, "__func__", None)
    space: dict[str, Any] = getattr(function, "__globals__", {})
    return str(space.get("__name__")).startswith(f"{LIBRARY}.")


def _tensors(module: nn.Module) -> Sequence[Tensor]:
    held = module._parameters
    found = [held[PACKED] if PACKED in held else held[PLAIN], held[SCALE], held.get(ZERO)]
    return [tensor for tensor in found if tensor is not None]


def _read(module: Any) -> Weight:
    """W over the module's numbers."""
    if not is_compressed(module):
        raise Unreadable(UNPACKED)
    held, asked = module._parameters, module.quantization_scheme.weights
    if held.get(ORDER) is not None:
        raise Unreadable("its groups are in the order of the activations (act-order)")
    if getattr(asked, "num_bits", 0) not in (4, 8):
        raise Unreadable(f"it has {asked.num_bits} bits, which no format has")
    k, n = module.out_features, module.in_features
    scales = held[SCALE].detach()
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    scales = scales.expand(k, -1) if scales.shape[0] == 1 else scales
    if scales.dim() != 2 or scales.shape[0] != k or n % scales.shape[1]:
        raise Unreadable(f"scales are {list(scales.shape)}, for [{k}, {n}]")
    values, made = _values(module, asked.num_bits)
    zeros = _zeros(held.get(ZERO), made, scales)
    group = n // scales.shape[1]
    if group == n and zeros is None and made is not INT4_GROUPS:
        made, group = INT8_ROWS if made is INT8_GROUPS else made, 0
    return Weight(values, made, scales, k, n, group, zeros)


def _values(module: Any, bits: int) -> tuple[Tensor, WeightFormat]:
    held, n = module._parameters, module.in_features
    if PACKED in held:
        words = held[PACKED].detach()
        if bits != 4 or words.dtype != torch.int32 or sys.byteorder != "little":
            raise Unreadable(f"it is packed in {bits} bits, as {words.dtype}")
        return words.view(torch.uint8)[:, : -(-n // 2)], INT4_GROUPS
    values = held[PLAIN].detach()
    made = {INT8: INT8_GROUPS, FP8: FP8_ROWS}.get(values.dtype)
    if made is None or bits != 8:
        raise Unreadable(f"it is held in {bits} bits, as {values.dtype}")
    return values, made


def _zeros(zeros: Tensor | None, made: WeightFormat, scales: Tensor) -> Tensor | None:
    """Zero points as the format has them, [k, groups] int8; packed ones are made whole."""
    if zeros is None:
        return None
    if zeros.dtype == torch.int32:  # packed like the weight, along the outputs
        words = zeros.detach()
        return layout.made_of([zeros], lambda: _unpacked(words)[: scales.shape[0]].contiguous())
    if made is FP8_ROWS or not bool(zeros.any()):
        if bool(zeros.double().any()):
            raise Unreadable("it has zero points, which its format does not have")
        return None
    zeros = zeros.detach().reshape(-1, 1) if zeros.dim() < 2 else zeros.detach()
    if zeros.dtype != torch.int8 or made is INT4_GROUPS:
        raise Unreadable(f"its zero points are {zeros.dtype}, beside {made.name}")
    return zeros.expand(scales.shape)


def _unpacked(words: Tensor) -> Tensor:
    """[k, groups] int8 of words that hold eight outputs each, [k / 8, groups]."""
    return nibbles(words.T.contiguous().view(torch.uint8)).T.to(torch.int8)


def own(module: nn.Module, x: Tensor) -> Tensor:
    """What the layer computes once it is unpacked, without leaving it so."""
    if not is_compressed(module):
        made: Tensor = type(module).forward(module, x)
        return made
    compressors: Any = sys.modules[f"{LIBRARY}.compressors"]
    scheme: Any = module.quantization_scheme
    kind = compressors.BaseCompressor.get_value_from_registry(scheme.format.value)
    state: dict[str, Any] = {
        name: held for name, held in module._parameters.items() if held is not None
    }
    state |= {name: held for name, held in module._buffers.items() if held is not None}
    return F.linear(x, kind.decompress(state, scheme)["weight"], module._parameters.get("bias"))


@layout.register_unpacking
def _hooks(model: nn.Module) -> list[Unpacking]:
    """The hook that unpacks all layers."""
    handle = getattr(model, HOOK, None)
    if handle is None or getattr(handle, "id", None) not in model._forward_pre_hooks:
        return []
    layers = [module for module in model.modules() if is_compressed(module)]
    return [Unpacking(model._forward_pre_hooks, handle.id, layers)]
