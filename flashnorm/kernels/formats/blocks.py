"""The blocks of a GGUF file, as they lie in it: [k, n / elements · bytes], uint8.

A block holds the numbers of `elements` features in a row with its own scales (float16, and in the
k formats integers of 6 or 8 bits below them). Source: ggml's block layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashnorm.kernels.weights import Weight, WeightFormat, register

Decode = Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """A kind of block. decode: [.., elements] float64 of [.., bytes] uint8."""

    format: WeightFormat
    elements: int
    bytes: int


BLOCKS: dict[str, Block] = {}


def find(weight: Weight) -> Block:
    """The kind of block of a weight. Raises KeyError where it is in none."""
    return BLOCKS[weight.format.name]


def define(name: str, code: int | None, elements: int, size: int, decode: Decode) -> Block:
    """A kind of block, registered as a format."""

    def dequantize(weight: Weight) -> Tensor:
        held = weight.values[: weight.outputs].unflatten(1, (-1, size))
        return decode(held).flatten(1)

    def unfit(weight: Weight) -> str:
        values, n = weight.values, weight.features
        if n % elements:
            return f"{n} features are no multiple of a block's {elements}"
        if values.dtype != torch.uint8 or values.shape[1:] != (n // elements * size,):
            found = f"values are {list(values.shape)} of {values.dtype}"
            return f"{found}; not [k, {n // elements * size}]"
        return "" if values.is_contiguous() else "the blocks are not dense"

    made = WeightFormat(name, dequantize, unfit, code)
    BLOCKS[name] = block = Block(register(made), elements, size)
    return block


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at a byte, [.., 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).double()


def _halves(packed: Tensor) -> Tensor:
    """[.., 2 m]: the low halves of m bytes, then the high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """[.., 32]: 16 for each feature whose bit is set in four bytes."""
    bits = blocks[..., at : at + 4, None] >> torch.arange(8, device=blocks.device)
    return ((bits & 1) << 4).flatten(-2)


def _q8_0(b: Tensor) -> Tensor:
    return b[..., 2:].contiguous().view(torch.int8).double() * _half(b, 0)


def _q4_0(b: Tensor) -> Tensor:
    return (_halves(b[..., 2:]).double() - 8) * _half(b, 0)


def _q4_1(b: Tensor) -> Tensor:
    return _halves(b[..., 4:]).double() * _half(b, 0) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return ((_halves(b[..., 6:]) | _fifth_bits(b, 2)).double() - 16) * _half(b, 0)


def _q5_1(b: Tensor) -> Tensor:
    return (_halves(b[..., 8:]) | _fifth_bits(b, 4)).double() * _half(b, 0) + _half(b, 2)


def _six_bits(s: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima, [.., 8] each, of 12 bytes: six bits each."""
    low, high = s[..., :4], s[..., 4:8]
    more = s[..., 8:]
    scales = torch.cat([low & 63, (more & 15) | (low >> 6 << 4)], -1)
    minima = torch.cat([high & 63, (more >> 4) | (high >> 6 << 4)], -1)
    return scales.double(), minima.double()


def _of_eight(b: Tensor, q: Tensor) -> Tensor:
    """d · scale · q − dmin · minimum for q [.., 8, 32]."""
    scales, minima = _six_bits(b[..., 4:16])
    scales, minima = scales * _half(b, 0), minima * _half(b, 2)
    return (q.double() * scales[..., None] - minima[..., None]).flatten(-2)


def _quarters(packed: Tensor) -> Tensor:
    """[.., 8, 32] of 128 bytes: of each 32 bytes the low halves, then the high ones."""
    parts = packed.unflatten(-1, (4, 32))
    return torch.stack([parts & 15, parts >> 4], -2).flatten(-3, -2)


def _q4_k(b: Tensor) -> Tensor:
    return _of_eight(b, _quarters(b[..., 16:]))


def _q5_k(b: Tensor) -> Tensor:
    bits = (b[..., 16:48, None] >> torch.arange(8, device=b.device)) & 1
    return _of_eight(b, _quarters(b[..., 48:]) | (bits.transpose(-1, -2) << 4))


def _q6_k(b: Tensor) -> Tensor:
    low = b[..., :128].unflatten(-1, (2, 2, 32))
    low = torch.cat([low & 15, low >> 4], -2)  # [.., 2, 4, 32]
    twos = 2 * torch.arange(4, device=b.device)[:, None]
    high = (b[..., 128:192].unflatten(-1, (2, 1, 32)) >> twos) & 3
    q = (low | (high << 4)).double() - 32
    scales = b[..., 192:208].contiguous().view(torch.int8).double() * _half(b, 208)
    return (q.flatten(-3).unflatten(-1, (16, 16)) * scales[..., None]).flatten(-2)


Q8_0 = define("q8_0", 32, 32, 34, _q8_0)
Q4_0 = define("q4_0", 33, 32, 18, _q4_0)
Q4_1 = define("q4_1", 34, 32, 20, _q4_1)
Q5_0 = define("q5_0", 35, 32, 22, _q5_0)
Q5_1 = define("q5_1", 36, 32, 24, _q5_1)
Q4_K = define("q4_k", 37, 256, 144, _q4_k)
Q5_K = define("q5_k", 38, 256, 176, _q5_k)
Q6_K = define("q6_k", 39, 256, 210, _q6_k)
