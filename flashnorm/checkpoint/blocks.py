"""A shard cut into blocks that are written independently of each other, in any order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashnorm import algebra
from flashnorm.checkpoint.header import FLOAT_DTYPES
from flashnorm.checkpoint.layout import Absorptions, Piece, Shard
from flashnorm.checkpoint.rawio import COPY_BYTES, copy_exact, read_exact, write_exact
from flashnorm.plan import Consumer, Gain, Span

FOLD_BYTES = 2 << 20  # measured best: smaller ones pay per call, larger ones leave the caches

Gains = dict[Gain, Tensor]


@dataclass(frozen=True)
class Block:
    """`nbytes` bytes from `start` of the source file, to be written from `target` on.

    `shape` is that of the rows in this block, `absorbs` what they absorb.
    """

    piece: Piece
    start: int
    target: int
    nbytes: int
    shape: tuple[int, ...] = ()
    absorbs: Absorptions = ()

    def write(self, reader: int, writer: int, gains: Gains) -> int:
        """Read, rewrite and write these bytes; returns how many elements became subnormal."""
        if self.piece.is_copy:
            copy_exact(reader, writer, self.start, self.nbytes, self.target)
            return 0
        view = memoryview(bytearray(self.nbytes))
        read_exact(reader, view, self.start)
        lost = self._rewrite_(view, gains)
        write_exact(writer, view, self.target)
        return lost

    def _rewrite_(self, view: memoryview, gains: Gains) -> int:
        entry, lost = self.piece.entry, 0
        rows = torch.frombuffer(view, dtype=FLOAT_DTYPES[entry.dtype]).view(self.shape)
        if self.piece.identity is not None:
            algebra.identity_gain_(rows, self.piece.identity)
        for gain, consumer in self.absorbs:
            g, axis, spans = gains[gain], consumer.axis, consumer.spans
            lost += algebra.check_fold(entry.name, rows, gain.parameter, g, axis, spans)
            algebra.fold_gain_(rows, g, axis, spans)
        return lost


def shard_blocks(shard: Shard) -> Iterator[Block]:
    """All blocks of a shard in the order of their bytes, which leave no byte out."""
    origin, target = len(shard.source.raw), len(shard.header.raw)
    for piece in _merged(shard.pieces):
        cut = _copy_blocks if piece.is_copy else _row_blocks
        for block in cut(piece):
            yield replace(block, start=origin + block.start, target=target)
            target += block.nbytes


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


def _copy_blocks(piece: Piece) -> Iterator[Block]:
    entry = piece.entry
    for start in range(entry.start, entry.end, COPY_BYTES):
        yield Block(piece, start, 0, min(COPY_BYTES, entry.end - start))


def _row_blocks(piece: Piece) -> Iterator[Block]:
    """The tensor in blocks of at most `FOLD_BYTES`, or of one row where a row is larger.

    The axes before the first one that carries a gain are made one: [lead, *inner]. Several inner
    tensors make a block; one that is too large is cut along its own first axis.
    """
    entry = piece.entry
    if not entry.nbytes:
        return
    shape = entry.shape or (1,)
    split = min((consumer.axis for _, consumer in piece.absorbs), default=0)
    lead, inner = math.prod(shape[:split]), shape[split:]
    size = entry.nbytes // lead
    if size <= FOLD_BYTES:
        absorbs = _moved(piece.absorbs, 1 - split)
        step = FOLD_BYTES // size
        for first in range(0, lead, step):
            count = min(step, lead - first)
            start = entry.start + first * size
            yield Block(piece, start, 0, count * size, (count, *inner), absorbs)
        return
    absorbs, row = _moved(piece.absorbs, -split), size // inner[0]
    step = max(1, FOLD_BYTES // row)
    for index in range(lead):
        for first in range(0, inner[0], step):
            count = min(step, inner[0] - first)
            start = entry.start + index * size + first * row
            part = _rows_of(absorbs, first, first + count)
            yield Block(piece, start, 0, count * row, (count, *inner[1:]), part)


def _moved(absorbs: Absorptions, by: int) -> Absorptions:
    return tuple((gain, replace(consumer, axis=consumer.axis + by)) for gain, consumer in absorbs)


def _rows_of(absorbs: Absorptions, first: int, stop: int) -> Absorptions:
    """What rows `first : stop` absorb; only a gain along the rows is cut."""
    return tuple(
        (gain, consumer if consumer.axis else _cut(consumer, first, stop))
        for gain, consumer in absorbs
    )


def _cut(consumer: Consumer, first: int, stop: int) -> Consumer:
    spans = []
    for span in consumer.spans:
        low, high = max(span.start, first), min(span.start + span.length, stop)
        if low < high:
            spans.append(Span(low - first, span.gain_start + low - span.start, high - low))
    return replace(consumer, spans=tuple(spans))
