"""How a model's linear layers are quantized before it is measured."""

from __future__ import annotations

from torch import nn

from flashnorm.errors import FlashNormError

GROUP = 32
METHODS = ("int8", "int4", "float8")


def quantize_(model: nn.Module, method: str) -> nn.Module:
    """Weights alone, by torchao: int8 and float8 by rows, int4 in groups of 32; in place.

    Raises FlashNormError where there is no such method, ImportError where torchao is not installed.
    """
    import torch
    from torchao import quantization as ao

    made = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(vars(torch)["int4"], ao.PerGroup(GROUP)),
        "float8": lambda: ao.Float8WeightOnlyConfig(),
    }
    if method not in made:
        raise FlashNormError(f"no quantization {method!r}: choose from {', '.join(METHODS)}")
    ao.quantize_(model, made[method]())
    return model
