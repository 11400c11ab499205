"""Linear layers that hold four bits in words as GPTQ's and AWQ's files do, and multiply by them.

gptqmodel may not be installed, so these are written from its sources (TorchLinear and
AwqTorchLinear, 7.7): the same buffers, and the same arithmetic, `scales[g] * (q − zeros[g])`, then
a product in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # output 8c + ORDER[j] lies in bits 4j of a word


def _words(numbers: Tensor) -> Tensor:
    """int32 [..] of numbers [.., 8], the first in the lowest bits."""
    made = torch.zeros(numbers.shape[:-1], dtype=torch.int64)
    for j in range(8):
        made |= numbers[..., j].long() << 4 * j
    return (made - (made >= 2**31).long() * 2**32).to(torch.int32)


def _quantized(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [n, k] and zeros, scales [groups, k] of a weight [k, n]."""
    k, n = weight.shape
    parts = weight.double().T.reshape(n // group, group, k)
    low, high = parts.amin(1), parts.amax(1)
    scales = (high - low) / 15
    zeros = (-low / scales).round().clamp(1, 15)
    q = (parts / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return q.reshape(n, k).int(), zeros.int(), scales


class GptqLinear(nn.Module):
    """Buffers of a GPTQ layer; `version` is what its zeros are: 1 as in a file, 2 as they act."""

    bits = 4

    def __init__(self, n: int, k: int, group: int, bias: bool, version: int = 2) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = n, k, group
        self.version = version
        self.register_buffer("qweight", torch.zeros(n // 8, k, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(n // group, k // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(n // group, k))
        self.register_buffer("g_idx", torch.arange(n, dtype=torch.int32) // group)
        self.register_buffer("bias", torch.zeros(k) if bias else None)

    @classmethod
    def of(cls, layer: nn.Linear, group: int, version: int = 2) -> GptqLinear:
        k, n = layer.weight.shape
        made = cls(n, k, group, layer.bias is not None, version)
        q, zeros, scales = _quantized(layer.weight.data, group)
        made.qweight = _words(q.reshape(n // 8, 8, k).permute(0, 2, 1))
        made.qzeros = _words((zeros - int(version == 1)).reshape(-1, k // 8, 8))
        made.scales = scales.to(layer.weight.dtype)
        if layer.bias is not None:
            made.bias = layer.bias.data.clone()
        return made

    def qzero_format(self) -> int:
        return self.version

    def dense(self) -> Tensor:
        """[n, k] in the dtype of the scales."""
        zeros = (self.qzeros.unsqueeze(2) >> SHIFTS).bitwise_and(15).flatten(1)
        q = (self.qweight.unsqueeze(1) >> SHIFTS[:, None]).bitwise_and(15).flatten(0, 1)
        groups = self.g_idx.long()
        return self.scales[groups] * (q - zeros[groups] - int(self.version == 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x.reshape(-1, x.shape[-1]), self.dense().to(x.dtype))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))


class AwqLinear(nn.Module):
    """Buffers of an AWQ layer, which computes in half precision only."""

    bits = 4

    def __init__(self, n: int, k: int, group: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = n, k, group
        self.register_buffer("qweight", torch.zeros(n, k // 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(n // group, k // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(n // group, k))
        self.register_buffer("bias", torch.zeros(k) if bias else None)

    @classmethod
    def of(cls, layer: nn.Linear, group: int) -> AwqLinear:
        k, n = layer.weight.shape
        made = cls(n, k, group, layer.bias is not None)
        q, zeros, scales = _quantized(layer.weight.data, group)
        made.qweight = _words(q.reshape(n, k // 8, 8)[..., ORDER])
        made.qzeros = _words(zeros.reshape(-1, k // 8, 8)[..., ORDER])
        made.scales = scales.to(layer.weight.dtype)
        if layer.bias is not None:
            made.bias = layer.bias.data.clone()
        return made

    def _unpacked(self, words: Tensor) -> Tensor:
        found = torch.empty(*words.shape, 8, dtype=torch.int32)
        for j, place in enumerate(ORDER):
            found[..., place] = (words >> 4 * j) & 15
        return found.flatten(1)

    def dense(self) -> Tensor:
        """[n, k] in the dtype of the scales."""
        zeros = self._unpacked(self.qzeros).repeat_interleave(self.group_size, 0)
        scales = self.scales.repeat_interleave(self.group_size, 0)
        return (self._unpacked(self.qweight) - zeros) * scales

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float16
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        y = torch.matmul(rows, self.dense().to(dtype))
        y = y if self.bias is None else y + self.bias.to(dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
