"""What the folded checkpoint will hold, byte for byte, decided before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from flashnorm.checkpoint.changes import Changes, plan_changes
from flashnorm.checkpoint.config import QUANTIZED_REMEDY
from flashnorm.checkpoint.defaults import check_defaults
from flashnorm.checkpoint.header import FLOAT_DTYPES, Entry, Header, build_header
from flashnorm.checkpoint.mapping import REMEDY, Mapped, map_parameters
from flashnorm.checkpoint.source import Source
from flashnorm.checkpoint.translate import Absorptions
from flashnorm.errors import CheckpointError, QuantizedError
from flashnorm.marker import Absent
from flashnorm.plan import Plan


@dataclass(frozen=True)
class Piece:
    """One tensor to write, from `entry` of the source.

    It absorbs gains and is then centered along the axis `center`; or it is `small` and written
    anew; with neither it is copied as it is.
    """

    entry: Entry
    absorbs: Absorptions = ()
    center: int | None = None
    small: bool = False

    @property
    def is_copy(self) -> bool:
        return not self.absorbs and self.center is None and not self.small


@dataclass(frozen=True)
class Shard:
    """One file to write: its header, then its pieces in the order of their bytes."""

    name: str
    source: Header
    header: Header
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """All files with tensors, and the changes that make them.

    `index` is the new index.json, None where the source's own stays true.
    """

    shards: tuple[Shard, ...]
    changes: Changes
    index: dict[str, Any] | None

    @property
    def total_bytes(self) -> int:
        return sum(shard.header.file_bytes for shard in self.shards)


def plan_layout(source: Source, plan: Plan, *, strict: bool) -> Layout:
    """Match the plan with the checkpoint; raise CheckpointError where they do not fit."""
    mapped = map_parameters(source, plan_parameters(plan))
    changes = plan_changes(plan, mapped, strict=strict)
    for name in sorted(changes.touched):
        _check_float(source.where[name].entry)
    shards = tuple(_shard(name, header, changes) for name, header in source.shards.items())
    if strict:
        check_defaults(source, _left_values(plan))
    if changes.removed or plan.untied:
        _check_names(source, shards, changes, bool(plan.untied))
    changed = changes.removed or changes.copies
    return Layout(shards, changes, _index(source, shards) if changed else None)


def copied_layout(source: Source) -> Layout:
    """The layout of a copy."""
    changes = Changes(Mapped({}))
    shards = (_shard(name, header, changes) for name, header in source.shards.items())
    return Layout(tuple(shards), changes, None)


def _left_values(plan: Plan) -> dict[str, float]:
    """What a fold leaves in the parameters that strict mode removes."""
    found = {norm_bias.parameter: 0.0 for norm_bias in plan.norm_biases() if norm_bias.folded}
    return found | {gain.parameter: gain.identity for gain in plan.gains()}


def left_out(source: Source, plan: Plan, changes: Changes) -> Absent:
    """What strict mode removes, as an engine has to put it back that knows no defaults.

    Raises CheckpointError for a tensor whose parts are one and zero, which no single value is.
    """
    found: Absent = {}
    for name, value in _left_values(plan).items():
        for tensor in changes.removed.intersection(changes.mapped[name].tensors):
            entry = source.where[tensor].entry
            if found.setdefault(tensor, (entry.shape, entry.dtype, value))[2] != value:
                raise CheckpointError(
                    f"strict mode would remove {tensor}, which holds gains and biases: fold "
                    "without strict"
                )
    return found


def plan_parameters(plan: Plan) -> set[str]:
    """Every parameter that a plan reads or writes."""
    names = {gain.parameter for gain in plan.gains()} | plan.absorptions().keys()
    names |= {b.parameter for b in plan.norm_biases()} | plan.bias_absorptions().keys()
    names |= {centering.parameter for centering in plan.centerings}
    return names | {name for pair in plan.untied for name in pair}


def _check_names(source: Source, shards: tuple[Shard, ...], changes: Changes, untied: bool) -> None:
    """Tensors that come or go, and ties that end, must not change where the others come from."""
    shapes = {e.name: e.shape for shard in shards for e in shard.header.entries}
    added = {copy.tensor for copy in changes.copies}
    before, after = changes.mapped, map_parameters(source, added, shapes, untied=untied)
    for name, provenance in before.provenances.items():
        if name in added or not changes.removed.isdisjoint(provenance.tensors):
            continue
        if untied and name not in after.provenances:
            raise CheckpointError(
                f"untying the head also parts {name} from {provenance.tensors[0]}, of which the "
                "checkpoint holds only one: fold without untie"
            )
        if name not in after.provenances or not provenance.same(after.provenances[name]):
            raise CheckpointError(
                f"without the tensors that strict mode removes, transformers would load {name} "
                "from other tensors: fold without strict"
            )
    for name in added:
        if after[name].tensors != (name,):
            raise CheckpointError(
                f"a tensor named {name} would not be loaded as the parameter of that name; {REMEDY}"
            )


def _pieces(header: Header, changes: Changes) -> Iterator[Piece]:
    """The tensors of one shard after the fold, in the order of their bytes, new ones last."""
    entries = sorted(header.entries, key=lambda entry: (entry.start, entry.end))
    for entry in entries:
        name = entry.name
        if name not in changes.removed:
            absorbs, center = changes.absorbs.get(name, ()), changes.centers.get(name)
            yield Piece(entry, absorbs, center, name in changes.small)
    for entry in entries:
        for copy in changes.copies:
            if copy.source == entry.name:
                yield Piece(replace(entry, name=copy.tensor), copy.absorbs)


def _check_float(entry: Entry) -> None:
    if entry.dtype not in FLOAT_DTYPES:
        raise QuantizedError(
            f"the tensor {entry.name} is stored as {entry.dtype}, so its values are quantized; "
            f"{QUANTIZED_REMEDY}"
        )


def _shard(name: str, source: Header, changes: Changes) -> Shard:
    pieces = tuple(_pieces(source, changes))
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
