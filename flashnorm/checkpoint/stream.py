"""Writing one shard: untouched tensors as raw bytes, folded ones block by block in one buffer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from flashnorm import algebra
from flashnorm.checkpoint.header import FLOAT_DTYPES
from flashnorm.checkpoint.layout import Absorptions, Layout, Piece, Shard
from flashnorm.checkpoint.rawio import COPY_BYTES, Report, copy_range, read_exact, write_all
from flashnorm.checkpoint.source import Place, Source
from flashnorm.errors import CheckpointError
from flashnorm.plan import Consumer, Gain, Span

BLOCK_BYTES = 2 << 20  # stays in the cache through the passes of check and fold

Gains = dict[Gain, Tensor]


def load_gains(source: Source, layout: Layout) -> Gains:
    """The effective gain of every folded site, as the model multiplies by it: flat, [n]."""
    return {
        gain: algebra.effective_gain(_load(source, place), gain)
        for gain, place in layout.gains.items()
    }


def check_twins(source: Source, layout: Layout) -> None:
    """Raise CheckpointError unless tensors that the plan takes for one hold the same bytes."""
    for new, old in layout.twins:
        if any(a != b for a, b in zip_longest(_chunks(source, new), _chunks(source, old))):
            raise CheckpointError(
                f"the plan copies {new.entry.name} from {old.entry.name}, to which config.json "
                "ties it, but the checkpoint holds both and they differ; set "
                "tie_word_embeddings to false, or remove the one that is not meant"
            )


def write_shard(source: Path, target: Path, shard: Shard, gains: Gains, report: Report) -> int:
    """Write `shard` from the file `source` to `target` and sync it; report bytes as they come.

    Returns how many elements became subnormal. Raises FoldError where the dtype overflows.
    """
    lost, origin, buffer = 0, len(shard.source.raw), bytearray()
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        write_all(writer, memoryview(shard.header.raw))
        report(len(shard.header.raw))
        for piece in _merged(shard.pieces):
            if piece.is_copy:
                start = origin + piece.entry.start
                copy_range(reader, writer, start, piece.entry.nbytes, report)
                continue
            for block in _blocks(piece):
                if len(buffer) < block.nbytes:
                    buffer = bytearray(block.nbytes)
                view = memoryview(buffer)[: block.nbytes]
                read_exact(reader, view, origin + block.start)
                lost += block.rewrite_(view, gains)
                write_all(writer, view)
                report(block.nbytes)
        os.fsync(writer.fileno())
    return lost


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of a tensor that change together; `start` counts from the data block."""

    piece: Piece
    start: int
    shape: tuple[int, ...]
    nbytes: int
    absorbs: Absorptions

    def rewrite_(self, view: memoryview, gains: Gains) -> int:
        """Rewrite the bytes of these rows in place; returns how many became subnormal."""
        entry = self.piece.entry
        rows = torch.frombuffer(view, dtype=FLOAT_DTYPES[entry.dtype]).view(self.shape)
        if self.piece.identity is not None:
            algebra.identity_gain_(rows, self.piece.identity)
            return 0
        lost = 0
        for gain, consumer in self.absorbs:
            g, axis, spans = gains[gain], consumer.axis, consumer.spans
            lost += algebra.check_fold(entry.name, rows, gain.parameter, g, axis, spans)
            algebra.fold_gain_(rows, g, axis, spans)
        return lost


def _merged(pieces: tuple[Piece, ...]) -> Iterator[Piece]:
    """The pieces, with neighbours that are only copied made into one."""
    held: Piece | None = None
    for piece in pieces:
        if held and held.is_copy and piece.is_copy and held.entry.end == piece.entry.start:
            held = Piece(replace(held.entry, end=piece.entry.end))
            continue
        if held:
            yield held
        held = piece
    if held:
        yield held


def _blocks(piece: Piece) -> Iterator[_Block]:
    """The tensor in blocks of rows, about `BLOCK_BYTES` each."""
    entry = piece.entry
    if not entry.nbytes:
        return
    shape, absorbs = _flattened(entry.shape or (1,), piece.absorbs)
    row = entry.nbytes // shape[0]
    step = max(1, BLOCK_BYTES // row)
    for first in range(0, shape[0], step):
        stop = min(first + step, shape[0])
        size = (stop - first) * row
        part = tuple((g, _rows_of(consumer, first, stop)) for g, consumer in absorbs)
        yield _Block(piece, entry.start + first * row, (stop - first, *shape[1:]), size, part)


def _flattened(shape: tuple[int, ...], absorbs: Absorptions) -> tuple[tuple[int, ...], Absorptions]:
    """Leading axes that carry no gain made into one, so that rows of stacked experts are rows."""
    lead = min((consumer.axis for _, consumer in absorbs), default=0)
    if lead < 2:
        return shape, absorbs
    moved = tuple((g, replace(c, axis=c.axis - lead + 1)) for g, c in absorbs)
    return (math.prod(shape[:lead]), *shape[lead:]), moved


def _rows_of(consumer: Consumer, first: int, stop: int) -> Consumer:
    """The consumer as seen by rows `first : stop`; only a gain along the rows changes."""
    if consumer.axis:
        return consumer
    spans = []
    for span in consumer.spans:
        low, high = max(span.start, first), min(span.start + span.length, stop)
        if low < high:
            spans.append(Span(low - first, span.gain_start + low - span.start, high - low))
    return replace(consumer, spans=tuple(spans))


def _load(source: Source, place: Place) -> Tensor:
    entry = place.entry
    data = bytearray(b"".join(_chunks(source, place)))
    if not data:
        return torch.empty(entry.shape, dtype=FLOAT_DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=FLOAT_DTYPES[entry.dtype]).view(entry.shape)


def _chunks(source: Source, place: Place) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time."""
    origin = len(source.shards[place.shard].raw) + place.entry.start
    with open(source.path / place.shard, "rb", buffering=0) as reader:
        for done in range(0, place.entry.nbytes, COPY_BYTES):
            chunk = bytearray(min(COPY_BYTES, place.entry.nbytes - done))
            read_exact(reader, memoryview(chunk), origin + done)
            yield bytes(chunk)
