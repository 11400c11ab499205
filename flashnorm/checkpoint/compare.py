"""A written shard held against what the plan makes of its source, a few blocks at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flashnorm.checkpoint.blocks import Block, tensor_blocks
from flashnorm.checkpoint.header import DTYPE_BITS, NUMBER_DTYPES, Entry
from flashnorm.checkpoint.layout import Shard
from flashnorm.checkpoint.rawio import Prefetch, expect_sequential, unchanged
from flashnorm.checkpoint.remote import Facts
from flashnorm.checkpoint.store import Folder
from flashnorm.checkpoint.stream import Report, in_workers
from flashnorm.checkpoint.values import Values

PART_BYTES = 1 << 18
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what it should be: `what` is values, dtype, shape, missing or extra.

    Of values: `count` of `numel` elements have other bits, the first at index `first`, which is
    `found` where `expected` should be; `largest` is max|Δ|, None where elements are no numbers.
    `summed`: sums make it (W β, means), whose last bit may differ between machines.
    """

    tensor: str
    file: str
    what: str
    found: str = ""
    expected: str = ""
    count: int = 0
    numel: int = 0
    first: tuple[int, ...] = ()
    largest: float | None = None
    summed: bool = False

    def joined(self, other: Difference | None) -> Difference:
        """With another part of the same tensor."""
        if other is None:
            return self
        earlier = min(self, other, key=lambda part: part.first)
        pair = (self.largest, other.largest)
        largest = None if None in pair else _largest(torch.tensor(pair, dtype=torch.float64))
        return replace(earlier, count=self.count + other.count, largest=largest)


@dataclass(frozen=True)
class Check:
    """The job of `check_shard`: a source's shard and a file of the candidate, as they were when
    their facts were taken."""

    shard: Shard
    source: Folder
    candidate: Folder
    file: str
    facts: tuple[Facts, Facts]

    @property
    def name(self) -> str:
        return self.file

    @property
    def nbytes(self) -> int:
        return sum(piece.entry.nbytes for piece in self.shard.pieces)

    def run(self, values: Values, report: Report) -> tuple[Difference, ...]:
        """The tensors that differ. Raises CheckpointError where a file is not the same here."""
        with (
            self.source.on_disk(self.shard.name, self.facts[0]) as source,
            self.candidate.on_disk(self.file, self.facts[1]) as candidate,
        ):
            return check_shard(source, candidate, self.shard, values, report)


def check_shard(
    source: Path, candidate: Path, shard: Shard, values: Values, report: Report
) -> tuple[Difference, ...]:
    """Compare what `write_shard` would write from `source` with what `candidate` holds, by bits.

    The pieces of `shard` are compared, where its header, which is the candidate's, has them; bytes
    are reported as they are done. Returns the tensors that differ. Arguments and result can be
    sent to another process. Raises FoldError where the fold would overflow, and CheckpointError
    where one of the files changes meanwhile.
    """
    entries = {entry.name: entry for entry in shard.header.entries}
    found: dict[str, Difference] = {}
    with open(source, "rb") as reader, open(candidate, "rb") as other:
        files = reader.fileno(), other.fileno()

        def compare(block: Block) -> Difference | None:
            return _compare(block, *files, values, len(shard.header.raw), entries)

        for file in files:
            expect_sequential(file)
        with (
            unchanged(source, files[0], shard.source.raw),
            unchanged(candidate, files[1], shard.header.raw),
        ):
            for block, wrong in in_workers(compare, _prefetched(tensor_blocks(shard), *files)):
                report(block.nbytes)
                if wrong is not None:
                    found[wrong.tensor] = wrong.joined(found.get(wrong.tensor))
    return tuple(
        replace(wrong, file=candidate.name, summed=values.sums(wrong.tensor))
        for wrong in found.values()
    )


def _prefetched(blocks: Iterator[Block], reader: int, candidate: int) -> Iterator[Block]:
    """The blocks, each asked for in both files before its turn."""
    ours, theirs = Prefetch(reader), Prefetch(candidate)
    for block in blocks:
        ours.upto(block.start)
        theirs.upto(block.target)
        yield block


def _compare(
    block: Block,
    reader: int,
    candidate: int,
    values: Values,
    origin: int,
    entries: dict[str, Entry],
) -> Difference | None:
    """How the block differs; `origin` is where the tensors of the candidate begin."""
    expected, _ = block.new_bytes(reader, values)
    found = block.old_bytes(candidate)
    if not block.nbytes or torch.equal(*_as_integers(expected, found, 8)):
        return None
    entry, wrong = entries[block.piece.entry.name], None
    for (one, offset), (other, _) in zip(
        _parts(block, expected), _parts(block, found), strict=True
    ):
        begin = block.target + offset - origin - entry.start
        if (part := _difference(entry, one, other, begin)) is not None:
            wrong = part.joined(wrong)
    return wrong


def _parts(block: Block, view: memoryview) -> Iterator[tuple[memoryview, int]]:
    """What lies together, cut small, because differences are told in float64."""
    for row, offset in block.rows(view):
        for at in range(0, len(row), PART_BYTES):
            yield row[at : at + PART_BYTES], offset + at


def _difference(
    entry: Entry, expected: memoryview, found: memoryview, begin: int
) -> Difference | None:
    """How bytes of a tensor differ that lie together, `begin` bytes after its first."""
    if DTYPE_BITS[entry.dtype] < 8:  # elements have no bytes of their own, so bytes are counted
        entry = replace(entry, dtype="U8", shape=(entry.nbytes,))
    width = DTYPE_BITS[entry.dtype] // 8
    one, other = _as_integers(expected, found, width)
    differs = one != other
    if not bool(differs.any()):
        return None
    at = int(differs.to(torch.uint8).argmax())
    index = begin // width + at
    numbers = NUMBER_DTYPES.get(entry.dtype)
    largest = None
    if numbers is not None:
        pair = (bits[differs].view(numbers).to(torch.float64) for bits in (other, one))
        largest = _largest(next(pair) - next(pair))
    return Difference(
        entry.name,
        "",
        "values",
        _element(other, at, numbers),
        _element(one, at, numbers),
        int(differs.count_nonzero()),
        entry.numel,
        _unraveled(index, entry.shape),
        largest,
    )


def _as_integers(one: memoryview, other: memoryview, width: int) -> tuple[Tensor, Tensor]:
    """Both as integers of `width` bytes, or as bytes where they do not divide into these."""
    dtype = _BITS[width if len(one) % width == 0 else 1]
    return torch.frombuffer(one, dtype=dtype), torch.frombuffer(other, dtype=dtype)


def _element(bits: Tensor, at: int, numbers: torch.dtype | None) -> str:
    """One element as a number with its bits, or its bits alone."""
    one = bits[at : at + 1]
    width = one.element_size()
    in_hex = f"0x{int(one) % (1 << 8 * width):0{2 * width}x}"
    return in_hex if numbers is None else f"{one.view(numbers).item()!r} ({in_hex})"


def _unraveled(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        found.append(rest)
    return tuple(reversed(found))


def _largest(differences: Tensor) -> float:
    """max|Δ|; NaN where one is."""
    return float(differences.abs().max())
