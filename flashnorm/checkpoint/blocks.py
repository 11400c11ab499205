"""A shard cut into blocks that are written independently of each other, in any order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashnorm import algebra
from flashnorm.checkpoint.header import FLOAT_DTYPES
from flashnorm.checkpoint.layout import Piece, Shard
from flashnorm.checkpoint.rawio import COPY_BYTES, copy_exact, read_exact, scratch, write_exact
from flashnorm.checkpoint.translate import Absorptions
from flashnorm.checkpoint.values import Values
from flashnorm.plan import Consumer, Span

FOLD_BYTES = 2 << 20  # measured best: smaller ones pay per call, larger ones leave the caches
CACHED_BYTES = 1 << 20  # what is read twice and compared stays in a core's cache


@dataclass(frozen=True)
class Block:
    """`nbytes` bytes from `start` of the source file, to be written from `target` on.

    `shape` is that of the rows in this block, `absorbs` what they absorb, `center` the axis of the
    mean that they lose. Where `pitch` is not zero they do not lie together: each of the first axis
    begins `pitch` bytes after the one before.
    """

    piece: Piece
    start: int
    target: int
    nbytes: int
    shape: tuple[int, ...] = ()
    absorbs: Absorptions = ()
    center: int | None = None
    pitch: int = 0

    @property
    def end(self) -> int:
        """Where the bytes end that are surely written with this block."""
        return self.target if self.pitch else self.target + self.nbytes

    def write(self, reader: int, writer: int, values: Values) -> int:
        """Read, rewrite and write these bytes; returns how many elements became subnormal."""
        if self.piece.is_copy:
            copy_exact(reader, writer, self.start, self.nbytes, self.target)
            return 0
        new, lost = self.new_bytes(reader, values)
        for row, offset in self.rows(new):
            write_exact(writer, row, self.target + offset)
        return lost

    def new_bytes(self, reader: int, values: Values) -> tuple[memoryview, int]:
        """What belongs into the target, and how many elements became subnormal on the way.

        The next block of this thread is read into the same memory.
        """
        if self.piece.small:
            return _bytes(values.tensor(self.piece.entry.name)), 0
        view = self._read(reader, self.start, "new")
        return view, 0 if self.piece.is_copy else self._rewrite_(view, values)

    def old_bytes(self, target: int) -> memoryview:
        """What lies in the target already, in the order of `new_bytes` and held as long."""
        return self._read(target, self.target, "old")

    def rows(self, view: memoryview) -> Iterator[tuple[memoryview, int]]:
        """The parts of the block that lie together, each with its offset in the files."""
        if not self.pitch:
            yield view, 0
            return
        width = self.nbytes // self.shape[0]
        for row in range(self.shape[0]):
            yield view[row * width : (row + 1) * width], row * self.pitch

    def _read(self, file: int, start: int, use: str) -> memoryview:
        view = scratch(use, self.nbytes)
        for row, offset in self.rows(view):
            read_exact(file, row, start + offset)
        return view

    def _rewrite_(self, view: memoryview, values: Values) -> int:
        entry = self.piece.entry
        rows = torch.frombuffer(view, dtype=FLOAT_DTYPES[entry.dtype]).view(self.shape)
        return values.rewrite_(entry.name, rows, self.absorbs, self.center)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def shard_blocks(shard: Shard) -> Iterator[Block]:
    """All blocks of a shard in the order of their bytes, which leave no byte out."""
    return _placed(shard, _merged(shard.pieces), COPY_BYTES)


def tensor_blocks(shard: Shard) -> Iterator[Block]:
    """The same, each of one tensor alone, and small enough for a cache."""
    return _placed(shard, shard.pieces, CACHED_BYTES)


def _placed(shard: Shard, pieces: Iterable[Piece], copy_bytes: int) -> Iterator[Block]:
    """The blocks of `pieces`, each written to where the header of the shard has its tensor."""
    origin, target = len(shard.source.raw), len(shard.header.raw)
    begins = {entry.name: entry.start for entry in shard.header.entries}
    for piece in pieces:
        begin = target + begins[piece.entry.name]
        for block in _cut_piece(piece, copy_bytes):
            offset = block.start - piece.entry.start
            yield replace(block, start=origin + block.start, target=begin + offset)


def _cut_piece(piece: Piece, copy_bytes: int) -> Iterator[Block]:
    if piece.is_copy:
        return _copy_blocks(piece, copy_bytes)
    if piece.small:
        return iter([Block(piece, piece.entry.start, 0, piece.entry.nbytes)])
    return _row_blocks(piece)


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


def _copy_blocks(piece: Piece, nbytes: int) -> Iterator[Block]:
    entry = piece.entry
    for start in range(entry.start, entry.end, nbytes):
        yield Block(piece, start, 0, min(nbytes, entry.end - start))


def _row_blocks(piece: Piece) -> Iterator[Block]:
    """The tensor in blocks of at most `FOLD_BYTES`, or of one row where a row is larger.

    The axes before the first one that carries a gain or a mean are made one: [lead, *inner].
    Several inner tensors make a block; one that is too large is cut along its own first axis, or
    along its second where the mean runs over the first.
    """
    entry = piece.entry
    if not entry.nbytes:
        return
    shape, axes = entry.shape or (1,), [consumer.axis for _, consumer in piece.absorbs]
    split = min(axes if piece.center is None else [*axes, piece.center])
    lead, inner = math.prod(shape[:split]), shape[split:]
    size = entry.nbytes // lead
    if size <= FOLD_BYTES or (piece.center == split and len(inner) == 1):
        whole = Block(piece, 0, 0, size, inner, *_moved(piece, 1 - split))
        step = max(1, FOLD_BYTES // size)
        for first in range(0, lead, step):
            count = min(step, lead - first)
            start = entry.start + first * size
            yield replace(whole, start=start, nbytes=count * size, shape=(count, *inner))
        return
    cut = _cut_columns if piece.center == split else _cut_rows
    for index in range(lead):
        start = entry.start + index * size
        yield from cut(Block(piece, start, 0, size, inner, *_moved(piece, -split)))


def _cut_rows(whole: Block) -> Iterator[Block]:
    count, *inner = whole.shape
    row = whole.nbytes // count
    step = max(1, FOLD_BYTES // row)
    for first in range(0, count, step):
        n = min(step, count - first)
        absorbs = _rows_of(whole.absorbs, 0, first, first + n)
        start = whole.start + first * row
        yield replace(whole, start=start, nbytes=n * row, shape=(n, *inner), absorbs=absorbs)


def _cut_columns(whole: Block) -> Iterator[Block]:
    """Blocks of all rows and some columns, as large as the algebra works on at once."""
    count, columns, *inner = whole.shape
    pitch = whole.nbytes // count
    column, elements = pitch // columns, math.prod(whole.shape)
    step = max(1, algebra.BLOCK_ELEMENTS * columns // elements)
    for first in range(0, columns, step):
        n = min(step, columns - first)
        absorbs = _rows_of(whole.absorbs, 1, first, first + n)
        start, nbytes = whole.start + first * column, count * n * column
        yield replace(
            whole,
            start=start,
            nbytes=nbytes,
            shape=(count, n, *inner),
            absorbs=absorbs,
            pitch=pitch,
        )


def _moved(piece: Piece, by: int) -> tuple[Absorptions, int | None]:
    """What a block absorbs and where its mean runs, when its axes are `by` further."""
    absorbs = tuple(
        (gain, replace(consumer, axis=consumer.axis + by)) for gain, consumer in piece.absorbs
    )
    return absorbs, None if piece.center is None else piece.center + by


def _rows_of(absorbs: Absorptions, axis: int, first: int, stop: int) -> Absorptions:
    """What positions `first : stop` of `axis` absorb; only a gain along it is cut."""
    return tuple(
        (gain, _cut(consumer, first, stop) if consumer.axis == axis else consumer)
        for gain, consumer in absorbs
    )


def _cut(consumer: Consumer, first: int, stop: int) -> Consumer:
    spans = []
    for span in consumer.spans:
        low, high = max(span.start, first), min(span.start + span.length, stop)
        if low < high:
            spans.append(Span(low - first, span.gain_start + low - span.start, high - low))
    return replace(consumer, spans=tuple(spans))
