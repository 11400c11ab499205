"""What the folded checkpoint will hold, byte for byte, decided before anything is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from flashnorm.checkpoint.config import QUANTIZED_REMEDY
from flashnorm.checkpoint.header import FLOAT_DTYPES, Entry, Header, build_header
from flashnorm.checkpoint.names import REMEDY, resolve_names
from flashnorm.checkpoint.source import Place, Source
from flashnorm.errors import CheckpointError, QuantizedError
from flashnorm.plan import Consumer, Gain, Plan

Absorptions = tuple[tuple[Gain, Consumer], ...]


@dataclass(frozen=True)
class Piece:
    """One tensor to write: `entry` of the source, which absorbs gains or becomes an identity gain.

    With neither it is copied as it is.
    """

    entry: Entry
    absorbs: Absorptions = ()
    identity: Gain | None = None

    @property
    def is_copy(self) -> bool:
        return not self.absorbs and self.identity is None


@dataclass(frozen=True)
class Shard:
    """One file to write: its header, then its pieces in the order of their bytes."""

    name: str
    source: Header
    header: Header
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """All files with tensors, and what has to be read before them.

    `gains` says where each gain is; `twins` are pairs of tensors that the fold takes for one tied
    weight, so they must hold the same bytes; `index` is the new index.json, None where the
    source's own stays true.
    """

    shards: tuple[Shard, ...]
    gains: dict[Gain, Place]
    twins: tuple[tuple[Place, Place], ...]
    index: dict[str, Any] | None

    @property
    def total_bytes(self) -> int:
        return sum(shard.header.file_bytes for shard in self.shards)


def plan_layout(source: Source, plan: Plan, *, strict: bool) -> Layout:
    """Match the plan with the checkpoint; raise CheckpointError where they do not fit."""
    absorptions = plan.absorptions()
    copied = {new: old for new, old in plan.untied if new not in source.where}
    wanted = [gain.parameter for gain in plan.gains()]
    wanted += [name for name in absorptions if name not in copied]
    wanted += [old for _, old in plan.untied]
    names = resolve_names(wanted, source.where)
    gains = {gain: source.where[names[gain.parameter]] for gain in plan.gains()}
    for name, pairs in absorptions.items():
        _check_fit(source.where[names[copied.get(name, name)]].entry, pairs, gains)

    edits = _Edits(strict)
    edits.absorbs = {names[name]: p for name, p in absorptions.items() if name not in copied}
    edits.identity = {place.entry.name: gain for gain, place in gains.items()}
    for new, old in copied.items():
        entry = replace(source.where[names[old]].entry, name=new)
        edits.copies[names[old]].append(Piece(entry, absorptions.get(new, ())))
    shards = tuple(_shard(name, header, edits) for name, header in source.shards.items())
    twins = tuple(
        (source.where[new], source.where[names[old]])
        for new, old in plan.untied
        if new in source.where
    )
    return Layout(shards, gains, twins, _index(source, shards) if strict or copied else None)


@dataclass
class _Edits:
    """What changes, by tensor of the source; the rest is copied."""

    strict: bool
    absorbs: dict[str, Absorptions] = field(default_factory=dict)
    identity: dict[str, Gain] = field(default_factory=dict)
    copies: dict[str, list[Piece]] = field(default_factory=lambda: defaultdict(list))

    def pieces(self, header: Header) -> Iterator[Piece]:
        """The tensors of one shard after the fold, in the order of their bytes, new ones last."""
        entries = sorted(header.entries, key=lambda entry: (entry.start, entry.end))
        for entry in entries:
            gain = self.identity.get(entry.name)
            if gain is None or not self.strict:
                yield Piece(entry, self.absorbs.get(entry.name, ()), gain)
        for entry in entries:
            yield from self.copies.get(entry.name, ())


def _check_fit(entry: Entry, pairs: Absorptions, gains: dict[Gain, Place]) -> None:
    """The tensors must be plain floats of the shape that the plan was made for."""
    _check_float(entry)
    for gain, consumer in pairs:
        _check_float(gains[gain].entry)
        width = entry.shape[consumer.axis] if -1 < consumer.axis < len(entry.shape) else 0
        numel = gains[gain].entry.numel
        if any(
            s.start + s.length > width or s.gain_start + s.length > numel for s in consumer.spans
        ):
            raise CheckpointError(
                f"the tensor {entry.name} of shape {list(entry.shape)} cannot absorb the gain "
                f"{gain.parameter} of {numel} elements along axis {consumer.axis} as the plan "
                f"says: the checkpoint stores it in another layout; {REMEDY}"
            )


def _check_float(entry: Entry) -> None:
    if entry.dtype not in FLOAT_DTYPES:
        raise QuantizedError(
            f"the tensor {entry.name} is stored as {entry.dtype}, so its values are quantized; "
            f"{QUANTIZED_REMEDY}"
        )


def _shard(name: str, source: Header, edits: _Edits) -> Shard:
    pieces = tuple(edits.pieces(source))
    order = {entry.name: rank for rank, entry in enumerate(source.entries)}
    if {piece.entry.name for piece in pieces} == set(order):
        return Shard(name, source, source, pieces)
    moved, position = [], 0
    for piece in pieces:
        end = position + piece.entry.nbytes
        moved.append(replace(piece.entry, start=position, end=end))
        position = end
    moved.sort(key=lambda entry: order.get(entry.name, len(order)))
    return Shard(name, source, build_header(moved, source.metadata), pieces)


def _index(source: Source, shards: tuple[Shard, ...]) -> dict[str, Any] | None:
    """index.json for the tensors that `shards` hold, in the source's order, new ones last."""
    if source.index is None:
        return None
    holds = {entry.name: shard.name for shard in shards for entry in shard.header.entries}
    index = dict(source.index)
    order = [key for key in source.index["weight_map"] if key in holds]
    index["weight_map"] = {key: holds[key] for key in dict.fromkeys([*order, *holds])}
    metadata = source.index.get("metadata")
    if isinstance(metadata, dict):
        index["metadata"] = dict(metadata)
        _count(index["metadata"], source, shards)
    return index


def _count(metadata: dict[str, Any], source: Source, shards: tuple[Shard, ...]) -> None:
    after = [entry for shard in shards for entry in shard.header.entries]
    if "total_size" in metadata:
        metadata["total_size"] = sum(entry.nbytes for entry in after)
    if isinstance(metadata.get("total_parameters"), int):
        before = sum(place.entry.numel for place in source.where.values())
        metadata["total_parameters"] += sum(entry.numel for entry in after) - before
