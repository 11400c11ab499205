"""Packed weights become plain ones, in place."""

from __future__ import annotations

from torch import Tensor, nn

from flashnorm.quantized.packed_tensor import PackedTensor


def dequantize_(model: nn.Module) -> nn.Module:
    """Give every packed weight of a model its numbers in memory: W, rounded once to its dtype.

    What is tied stays tied. Afterwards it is an ordinary model, which trains, folds and can be
    written by `save_pretrained`; it takes the memory of its dtype. A weight [k, n] keeps its shape,
    and has the dtype that the model computes in. Returns the model; one that holds no packed weight
    (`PackedTensor`, as `load_gguf` makes them) stays as it is. Raises nothing of its own.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, held in list(module._parameters.items()):
            if isinstance(held, PackedTensor):
                if id(held) not in made:
                    made[id(held)] = nn.Parameter(_plain(held))
                module.register_parameter(name, made[id(held)])
        for name, buffer in list(module._buffers.items()):
            if isinstance(buffer, PackedTensor):
                module._buffers[name] = _plain(buffer)
    return model


def _plain(held: PackedTensor) -> Tensor:
    return held.dequantize().contiguous()
