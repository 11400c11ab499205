"""The tensors of an adapter on disk: read one by one, and written with their edits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from flashnorm.adapters.config import WEIGHTS
from flashnorm.adapters.edits import Edit, Edits
from flashnorm.checkpoint.header import FLOAT_DTYPES, Entry, Header, build_header, read_header
from flashnorm.checkpoint.rawio import copy_exact, read_exact, write_exact
from flashnorm.checkpoint.source import Place, Source
from flashnorm.errors import CheckpointError

PICKLE = "adapter_model.bin"


def open_weights(path: Path) -> Source:
    """An adapter's tensors as a checkpoint of one file; raises CheckpointError where it is not
    sound."""
    if not (path / WEIGHTS).is_file():
        what = "holds its weights as a pickle" if (path / PICKLE).is_file() else f"has no {WEIGHTS}"
        raise CheckpointError(
            f"{path} {what}: load the adapter with PEFT and save it again, which makes safetensors"
        )
    header = read_header(path / WEIGHTS)
    where = {entry.name: Place(WEIGHTS, entry) for entry in header.entries}
    return Source(path, {}, None, {WEIGHTS: header}, where)


def entries(weights: Source) -> tuple[Entry, ...]:
    """The tensors in the order of the header."""
    return weights.shards[WEIGHTS].entries


def load(weights: Source, entry: Entry) -> Tensor:
    """One tensor, whole."""
    dtype = FLOAT_DTYPES[entry.dtype]
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    data = bytearray(entry.nbytes)
    with open(weights.path / WEIGHTS, "rb") as reader:
        start = len(weights.shards[WEIGHTS].raw) + entry.start
        read_exact(reader.fileno(), memoryview(data), start)
    return torch.frombuffer(data, dtype=dtype).view(entry.shape)


def new_entries(weights: Source, edits: Edits) -> Iterator[Entry]:
    """The biases that B gets, [out] in the dtype of B, behind all other tensors."""
    position = weights.shards[WEIGHTS].data_bytes
    for target in edits.biases:
        b = weights.where[f"{target}.lora_B.weight"].entry
        end = position + b.nbytes // b.shape[1]
        yield Entry(f"{target}.lora_B.bias", b.dtype, b.shape[:1], position, end)
        position = end


def write_weights(target: Path, weights: Source, edits: Edits) -> int:
    """Write the file `target` and sync it; returns how many elements became subnormal.

    What has no edit is copied byte for byte. Raises FoldError where a dtype overflows.
    """
    old, lost = weights.shards[WEIGHTS], 0
    new = tuple(new_entries(weights, edits))
    header = build_header((*old.entries, *new), old.metadata) if new else old
    with open(weights.path / WEIGHTS, "rb") as reader, open(target, "wb", buffering=0) as writer:
        write_exact(writer.fileno(), memoryview(header.raw), 0)
        for entry in old.entries:
            place = len(header.raw) + entry.start
            if edit := edits.by_key.get(entry.name):
                tensor = load(weights, entry)
                lost += _write_edited(writer.fileno(), header, entry, tensor, edit)
            else:
                start = len(old.raw) + entry.start
                copy_exact(reader.fileno(), writer.fileno(), start, entry.nbytes, place)
        for entry, edit in zip(new, edits.biases.values(), strict=True):
            zeros = torch.zeros(entry.shape, dtype=FLOAT_DTYPES[entry.dtype])
            _write_edited(writer.fileno(), header, entry, zeros, edit)
        os.fsync(writer.fileno())
    return lost


def _write_edited(writer: int, header: Header, entry: Entry, tensor: Tensor, edit: Edit) -> int:
    done, lost = edit.apply(entry.name, tensor)
    if entry.nbytes:
        data = bytearray(entry.nbytes)
        torch.frombuffer(data, dtype=done.dtype).copy_(done.reshape(-1))
        write_exact(writer, memoryview(data), len(header.raw) + entry.start)
    return lost
