"""The types of a GGUF file's tensors as packed formats, by ggml's names for them in lower case.

Those with a kernel are in `kernels.formats.blocks`. All others that the package gguf can decode get
a format that decodes with it; float16 and bfloat16 are blocks of one number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashnorm.errors import CheckpointError
from flashnorm.kernels.formats.blocks import BLOCKS, Block, define
from flashnorm.kernels.weights import Weight

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def kind(name: str) -> Block:
    """The blocks of a type. Raises CheckpointError where nothing here decodes it."""
    return BLOCKS[name] if name in BLOCKS else _defined(name)


def named(number: int) -> tuple[str, Block]:
    """The name and the blocks of a type by ggml's number for it.

    Raises CheckpointError where nothing here decodes it.
    """
    types = _gguf().GGMLQuantizationType
    try:
        name = types(number).name.lower()
    except ValueError as error:
        raise CheckpointError(
            f"type {number} of a tensor is none that gguf {_version()} knows: a newer one may"
        ) from error
    return name, kind(name)


def _defined(name: str) -> Block:
    if name in PLAIN:
        dtype = PLAIN[name]
        return define(name, None, 1, dtype.itemsize, lambda blocks: blocks.view(dtype).double())
    gguf = _gguf()
    sizes = {found.name.lower(): (found, *size) for found, size in gguf.GGML_QUANT_SIZES.items()}
    if name not in sizes:
        raise CheckpointError(f"{name!r} is no type of tensors that gguf {_version()} knows")
    found, elements, size = sizes[name]

    def decode(blocks: Tensor) -> Tensor:
        data = blocks.reshape(-1, size).cpu().numpy()
        numbers = torch.from_numpy(gguf.dequantize(data, found))
        return numbers.view(*blocks.shape[:-1], elements).to(blocks.device, torch.float64)

    try:
        decode(torch.zeros(1, size, dtype=torch.uint8))
    except NotImplementedError as error:
        raise CheckpointError(f"gguf {_version()} cannot decode tensors of type {name}") from error
    return define(name, None, elements, size, decode)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "reading GGUF files needs the packages gguf, accelerate and sentencepiece: "
            "pip install 'flashnorm[gguf]'"
        ) from error
    return gguf


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


@cache
def scale_places(name: str) -> tuple[int, ...]:
    """Where a block holds float16 numbers that scale others, in bytes.

    Seen by decoding: one that is no number makes numbers of the block so.
    """
    block = kind(name)
    places = range(0, block.bytes - 1)
    blocks = torch.zeros(len(places), block.bytes, dtype=torch.uint8)
    for row, place in enumerate(places):
        blocks[row, place : place + 2] = torch.tensor([1, 0x7E], dtype=torch.uint8)
    weight = Weight(blocks, block.format, None, len(places), block.elements)
    spoiled = ~weight.dequantized().isfinite().all(1)
    return tuple(place for place in places if bool(spoiled[place]))


def spoiled_blocks(name: str, values: Tensor) -> int:
    """How many blocks of [k, bytes] hold a scale that is infinite or no number."""
    blocks = values.unflatten(1, (-1, kind(name).bytes))
    wrong = torch.zeros(blocks.shape[:2], dtype=torch.bool, device=values.device)
    for place in scale_places(name):
        wrong |= (blocks[..., place + 1] & 0x7C) == 0x7C
    return int(wrong.sum())
