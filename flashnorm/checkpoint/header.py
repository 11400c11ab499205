"""The header of a safetensors file: read, validated and written without touching the tensors.

The format is eight little-endian bytes with the length of a JSON object, that object, then the
tensors as one dense block. A header that breaks any rule of the format is refused by name, because
a streaming rewrite trusts every offset in it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashnorm.content import AGAIN, why_damaged
from flashnorm.errors import CheckpointError
from flashnorm.reading import open_regular, parse_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_AXES = 64  # of torch
MAX_EMPTY = 1 << 31  # elements along the other axes of a tensor that has none

FLOAT_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# What torch can tell as numbers.
NUMBER_DTYPES: dict[str, torch.dtype] = {
    **FLOAT_DTYPES,
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16},
    **{"I32": torch.int32, "I64": torch.int64},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn},
}
DTYPE_BITS: dict[str, int] = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` and `end` count from the first byte after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A validated header: the bytes as they stand in the file and the tensors in their order."""

    raw: bytes
    entries: tuple[Entry, ...]
    metadata: dict[str, str] | None

    @property
    def data_bytes(self) -> int:
        return max((entry.end for entry in self.entries), default=0)

    @property
    def file_bytes(self) -> int:
        return len(self.raw) + self.data_bytes


def read_header(path: Path) -> Header:
    """The header of the safetensors file at `path`; raises CheckpointError where it is invalid."""
    try:
        raw, size = _read_raw(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> Header:
    """The header that `raw` is, of a file of `size` bytes that is named `path`, wherever it lies.

    Raises CheckpointError where it is invalid.
    """
    fields = _parse(path, raw[8:])
    metadata = _metadata(path, fields.pop("__metadata__", None))
    entries = tuple(_entry(path, name, value) for name, value in fields.items())
    _check_dense(path, entries)
    header = Header(raw, entries, metadata)
    if size < header.file_bytes:
        raise CheckpointError(
            f"{path.name} is truncated: its header claims {header.file_bytes} bytes, the file has "
            f"{size}; {AGAIN}"
        )
    if size > header.file_bytes:
        raise CheckpointError(
            f"{path.name} has {size - header.file_bytes} bytes that no tensor of its header owns"
        )
    return header


def header_bytes(path: Path, start: bytes, size: int) -> int:
    """How long the header of a file of `size` bytes is, by its first eight; CheckpointError."""
    if size < 8 or len(start) < 8:
        raise CheckpointError(
            f"{path.name} is truncated: {size} bytes hold no safetensors header; {AGAIN}"
        )
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path.name}: the header claims a length of {length} bytes, over the limit of "
            f"{MAX_HEADER_BYTES}; this is not a safetensors file"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path.name} is truncated: the header claims a length of {length} bytes, the "
            f"file has {size}; {AGAIN}"
        )
    return 8 + length


def build_header(entries: Iterable[Entry], metadata: dict[str, str] | None) -> Header:
    """A header for `entries` in the order given, padded with spaces to a multiple of 8 bytes."""
    entries = tuple(entries)
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    for entry in entries:
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Header(struct.pack("<Q", len(text)) + text, entries, metadata)


def _read_raw(path: Path) -> tuple[bytes, int]:
    """The length and the JSON as they stand in a file, and the size of the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size >= 8 and (damaged := why_damaged(path)):
            raise CheckpointError(damaged)
        start = file.read(8)
        return start + file.read(header_bytes(path, start, size) - 8), size


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        fields = parse_json(text.decode("utf-8"), unique=True)
    except ValueError as error:
        raise CheckpointError(f"{path.name}: the header is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or not text.startswith(b"{"):
        raise CheckpointError(f"{path.name}: the header is not a JSON object")
    return fields


def _metadata(path: Path, value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{path.name}: __metadata__ is not a map of strings")
    return value


def _entry(path: Path, name: str, value: Any) -> Entry:
    where = f"{path.name}: tensor {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has the unknown dtype {_short(dtype)}")
    if not _is_sizes(shape) or (0 in shape and math.prod(filter(None, shape)) > MAX_EMPTY):
        raise CheckpointError(f"{where} has the invalid shape {_short(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the invalid offsets {_short(offsets)}")
    entry = Entry(name, dtype, tuple(shape), *offsets)
    if entry.nbytes * 8 != entry.numel * DTYPE_BITS[dtype]:
        raise CheckpointError(
            f"{where} owns {entry.nbytes} bytes, which is not the size of {dtype} {list(shape)}"
        )
    return entry


def _is_sizes(value: Any) -> bool:
    """A list of as many numbers, and as large ones, as torch takes."""
    if not isinstance(value, list) or len(value) > MAX_AXES:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _short(value: Any) -> str:
    found = repr(value)
    return found if len(found) <= 200 else f"{found[:200]}… ({len(found)} characters)"


def _check_dense(path: Path, entries: tuple[Entry, ...]) -> None:
    """Every byte of the data block belongs to exactly one tensor."""
    position = 0
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a hole"
            raise CheckpointError(
                f"{path.name}: tensor {entry.name} {what}: it starts at {entry.start}, "
                f"{position} was expected"
            )
        position = entry.end
