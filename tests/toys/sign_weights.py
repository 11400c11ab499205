"""Weights of one bit, eight to a byte, and a scale per row: `W ≈ scale · sign(W)`."""

import torch

from flashnorm.kernels.weights import Weight, WeightFormat

BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def dequantize(weight):
    bits = (weight.values[..., None] & BITS).bool().flatten(1)[:, : weight.features]
    return torch.where(bits, 1.0, -1.0).double() * weight.scales.double()


SIGNS = WeightFormat("signs", dequantize)


def quantize(weight):
    padded = torch.nn.functional.pad(weight > 0, (0, -weight.shape[1] % 8))
    values = (padded.unflatten(1, (-1, 8)) * BITS).sum(-1, dtype=torch.uint8)
    return Weight(values, SIGNS, weight.abs().mean(-1, keepdim=True), *weight.shape)
