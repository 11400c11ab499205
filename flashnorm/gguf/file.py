"""What a GGUF file holds: its tensors by name, of which none is read before it is asked for."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flashnorm.content import AGAIN, why_damaged
from flashnorm.errors import CheckpointError
from flashnorm.gguf import header
from flashnorm.kernels.formats.blocks import Block
from flashnorm.kernels.weights import Weight
from flashnorm.quantized.decoding import decoded
from flashnorm.quantized.ggml import PLAIN, kind, named, spoiled_blocks
from flashnorm.reading import open_regular


class Stored(NamedTuple):
    """A tensor of a file: [.., k, n] in torch's order, as blocks of a type in `size` bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    place: int
    size: int

    @property
    def block(self) -> Block:
        """The kind of its blocks. Raises CheckpointError where nothing decodes them."""
        return kind(self.type)

    @property
    def quantized(self) -> bool:
        return self.type not in PLAIN


@dataclass(frozen=True)
class File:
    """A file that was looked into. architecture: its own word for the kind of model."""

    path: Path
    architecture: str
    tensors: tuple[Stored, ...]

    def values(self, stored: Stored) -> Tensor:
        """The bytes of a tensor, [rows, bytes of a row], in memory of their own.

        They are read and not mapped, so that the file's pages take no memory of the process.
        Raises CheckpointError where they are not there, or hold a scale that is no number.
        """
        found = torch.empty(stored.size, dtype=torch.uint8)
        with open_regular(self.path) as opened:
            opened.seek(stored.place)
            read = opened.readinto(found.numpy().data)
        if read != stored.size:
            raise CheckpointError(
                f"{self.path} ends in the middle of {stored.name}: its download was interrupted, "
                f"{AGAIN}"
            )
        found = found.view(prod(stored.shape[:-1]), -1)
        if stored.quantized and (count := spoiled_blocks(stored.type, found)):
            raise CheckpointError(
                f"{stored.name} in {self.path} has {count} blocks whose scale is infinite or not a "
                f"number: the file is damaged, {AGAIN}"
            )
        return found

    def numbers(self, stored: Stored) -> Tensor:
        """A tensor in float32, of its shape."""
        values = self.values(stored)
        if stored.type == "f32":
            return values.view(torch.float32).view(stored.shape)
        return decoded(weight(stored, values), torch.float32).view(stored.shape)


def weight(stored: Stored, values: Tensor) -> Weight:
    """The rows of a tensor as a packed weight."""
    return Weight(values, stored.block.format, None, values.shape[0], stored.shape[-1])


def look(path: Path) -> File:
    """The architecture and the tensors of a file; none is read.

    Raises CheckpointError where it is no GGUF file, is cut off, or of a type that nothing decodes.
    """
    if damaged := why_damaged(path):
        raise CheckpointError(damaged)
    try:
        head = header.read(path)
    except (ValueError, struct.error, OSError, OverflowError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a GGUF file ({error}): it is damaged, {AGAIN}"
        ) from error
    tensors = tuple(_stored(path, entry, head.end) for entry in head.entries)
    length = path.stat().st_size
    for stored in tensors:
        if stored.place + stored.size > length:
            raise CheckpointError(
                f"{path} ends before {stored.name} does: its download was interrupted, {AGAIN}"
            )
    return File(path, head.architecture, tensors)


def _stored(path: Path, entry: header.Entry, first: int) -> Stored:
    name, block = named(entry.type)
    if entry.shape[-1] % block.elements:
        raise CheckpointError(
            f"{entry.name} in {path} is {list(entry.shape)}: its rows are no multiple of the "
            f"{block.elements} numbers in a block of {name}: the file is damaged, {AGAIN}"
        )
    size = prod(entry.shape) // block.elements * block.bytes
    return Stored(entry.name, name, entry.shape, first + entry.place, size)
