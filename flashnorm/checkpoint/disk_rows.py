"""Weights that stay in the files of a checkpoint: rows are read when an operation asks for them.

Nothing is kept of what was read, so memory is bounded by what one operation takes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flashnorm.checkpoint.boxes import Box
from flashnorm.checkpoint.header import FLOAT_DTYPES
from flashnorm.checkpoint.provenance import Provenance
from flashnorm.checkpoint.rawio import read_exact
from flashnorm.checkpoint.source import Place, Source
from flashnorm.checkpoint.values import load_tensor
from flashnorm.compat.torch_names import make_wrapper_subclass
from flashnorm.quantized.row_tensor import RowTensor


class OpenShards:
    """The shards of a checkpoint, opened for reading until `close`.

    `read_bytes` is how many bytes of tensors were read so far; `told` is called with it.
    """

    def __init__(self, source: Source, told: Callable[[int], None] | None = None) -> None:
        self.source, self.told, self.read_bytes = source, told, 0
        self._files: dict[str, int] = {}

    def bytes_of(self, place: Place, first: int, count: int) -> Tensor:
        """`count` bytes of a tensor from byte `first` on: uint8."""
        made = torch.empty(count, dtype=torch.uint8)
        start = len(self.source.shards[place.shard].raw) + place.entry.start + first
        read_exact(self._file(place.shard), made.numpy().data, start)
        self._count(count)
        return made

    def part_of(self, place: Place, box: Box) -> Tensor:
        """A box of a tensor, in the order of the box."""
        found = load_tensor(self.source, place)[box.index]
        self._count(found.nbytes)
        return found

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, shard: str) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.source.path / shard, os.O_RDONLY)
        return self._files[shard]

    def _count(self, count: int) -> None:
        self.read_bytes += count
        if self.told is not None:
            self.told(self.read_bytes)


@dataclass(frozen=True)
class DiskWeight:
    """A parameter in the files: where its values lie, and the dtype in which the model loads it."""

    shards: OpenShards
    provenance: Provenance
    dtype: torch.dtype

    @property
    def features(self) -> int:
        return self.provenance.shape[-1]

    def read(self, first: int, stop: int) -> Tensor:
        """Rows first : stop of all leading dimensions one behind the other: [stop - first, n]."""
        parts = self.provenance.slices
        if len(parts) == 1 and parts[0].box.is_plain:
            return self._plain(parts[0].tensor, first, stop)
        each = math.prod(self.provenance.shape[1:-1])  # rows of one index of the first axis
        low, high = first // each, -(-stop // each)
        rows = self._joined(low, high).view(-1, self.features)
        return rows[first - low * each : stop - low * each]

    def gather(self, which: Tensor) -> Tensor:
        """The rows of these numbers, each of which is read once: [len(which), n]."""
        wanted, order = which.unique(return_inverse=True)
        breaks = (wanted.diff() != 1).nonzero().flatten() + 1
        runs = wanted.tensor_split(breaks.tolist()) if len(wanted) else ()
        read = [self.read(int(run[0]), int(run[-1]) + 1) for run in runs]
        rows = torch.cat(read) if read else torch.empty(0, self.features, dtype=self.dtype)
        return rows[order]

    def _plain(self, tensor: str, first: int, stop: int) -> Tensor:
        place = self.shards.source.where[tensor]
        stored = FLOAT_DTYPES[place.entry.dtype]
        row = self.features * stored.itemsize
        found = self.shards.bytes_of(place, first * row, (stop - first) * row)
        return found.view(stored).view(stop - first, self.features).to(self.dtype)

    def _joined(self, low: int, high: int) -> Tensor:
        """Positions low : high of the first axis, put together from the tensors they lie in."""
        made = torch.empty((high - low, *self.provenance.shape[1:]), dtype=self.dtype)
        for part in self.provenance.slices:
            start, count = part.start[0], part.box.shape[0]
            begin, end = max(low, start), min(high, start + count)
            if begin < end:
                box = part.box.along(begin - start, end - begin)
                where = (slice(begin - low, end - low), *part.place[1:])
                made[where] = self._box(part.tensor, box)
        return made

    def _box(self, tensor: str, box: Box) -> Tensor:
        place = self.shards.source.where[tensor]
        if box.lies_in_order:
            stored = FLOAT_DTYPES[place.entry.dtype]
            found = self.shards.bytes_of(place, 0, place.entry.nbytes)
            return found.view(stored).view(box.shape)
        return self.shards.part_of(place, box)


@dataclass(frozen=True)
class DiskRows:
    """Some rows of a parameter in the files, or rows that were read from there."""

    weight: DiskWeight
    first: int
    outputs: int
    values: Tensor | None = field(default=None, compare=False)

    @property
    def features(self) -> int:
        return self.weight.features

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def rows(self, which: slice | Tensor) -> DiskRows:
        """A view for a slice; the rows themselves for indices."""
        if self.values is not None:
            values = self.values[which]
            return replace(self, values=values, outputs=len(values))
        if isinstance(which, Tensor):
            values = self.weight.gather(self.first + which)
            return DiskRows(self.weight, 0, len(values), values)
        first, stop, _ = which.indices(self.outputs)
        return DiskRows(self.weight, self.first + first, max(0, stop - first))

    def dequantized(self) -> Tensor:
        """Their numbers, [outputs, n], float64."""
        if self.values is not None:
            return self.values.double()
        return self.weight.read(self.first, self.first + self.outputs).double()


class DiskTensor(RowTensor):
    """A weight [.., k, n] in the files of a checkpoint, used as a tensor of a floating dtype.

    The numbers are those that transformers would load, rounded once more to `dtype`.
    """

    held: DiskRows
    WHAT = "a weight in a file"
    MEND = "load the model into memory"

    @staticmethod
    def __new__(
        cls, held: DiskRows, shape: Sequence[int], dtype: torch.dtype, turned: bool = False
    ) -> DiskTensor:
        made: DiskTensor = make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=held.device, requires_grad=False
        )
        made.held, made.turned = held, turned
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        names = self.held.weight.provenance.tensors
        return f"DiskTensor({list(self.shape)}, {self.dtype}, {names[0]}, {len(names)} tensors)"

    def again(
        self,
        dtype: torch.dtype | None = None,
        device: Any = None,
        non_blocking: bool = False,
        copied: bool = False,
    ) -> DiskTensor:
        """Always on the CPU: `device` has no effect."""
        return DiskTensor(self.held, self.shape, dtype or self.dtype, self.turned)


def disk_tensor(shards: OpenShards, provenance: Provenance, dtype: torch.dtype) -> DiskTensor:
    """A parameter of two or more axes that stays in its files; `dtype` is what it is loaded in."""
    shape = provenance.shape
    rows = DiskRows(DiskWeight(shards, provenance, dtype), 0, math.prod(shape[:-1]))
    return DiskTensor(rows, shape, dtype)
