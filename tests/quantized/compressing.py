"""Linear layers compressed by compressed-tensors, with scales and zero points of their own."""

from __future__ import annotations

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from torch import nn

LARGEST = 448.0


def compress(
    model: nn.Module, bits: int, kind: str, group: int | None, symmetric: bool, form: str, **more
) -> nn.Module:
    """The model with its linear layers compressed, as transformers loads one."""
    strategy = "group" if group else "channel"
    args = QuantizationArgs(
        num_bits=bits, type=kind, strategy=strategy, group_size=group, symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form, **more)
    config = QuantizationConfig(
        config_groups={"all": scheme}, format=form, quantization_status="frozen"
    )
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _calibrate(module, bits, kind, group, symmetric)
    ModelCompressor(quantization_config=config).compress_model(model)
    return model.eval()


def _calibrate(module: nn.Module, bits: int, kind: str, group: int | None, symmetric: bool) -> None:
    weight = module.weight.data.float()
    parts = weight.view(weight.shape[0], -1, group or weight.shape[1])
    low, high, largest = parts.amin(-1), parts.amax(-1), parts.abs().amax(-1)
    top = 2 ** (bits - 1)
    if kind == "float":
        scale = largest / LARGEST
    elif symmetric:
        scale = largest / (top - 1)
    else:
        scale = (high - low) / (2 * top - 1)
        zeros = (-top - torch.round(low / scale)).clamp(-top, top - 1)
        module.weight_zero_point.data = zeros.to(torch.int8)
    module.weight_scale.data = scale.to(module.weight.dtype)
