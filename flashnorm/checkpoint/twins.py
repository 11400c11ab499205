"""Tensors of a checkpoint that its config takes for one tied weight: they must hold the same."""

from __future__ import annotations

from pathlib import Path

from flashnorm.checkpoint.mapping import Mapped, map_parameters
from flashnorm.checkpoint.source import Source, open_source
from flashnorm.errors import FlashNormError

UNEQUAL = (
    "config.json ties {} to {}, but the checkpoint holds both and they differ, so that readers "
    "differ in which one they take; set tie_word_embeddings to false, or remove the one that is "
    "not meant"
)


def unequal_twins(source: Source, mapped: Mapped) -> str:
    """Which tied weight is stored twice with different values, and the mend; empty if none is."""
    for name, others in mapped.twins.items():
        for other in others:
            pairs = zip(
                mapped.provenances[name].tensors, mapped.provenances[other].tensors, strict=False
            )
            for first, second in pairs:
                if not same_bytes(source, first, second):
                    return UNEQUAL.format(first, second)
    return ""


def why_untied(path: Path) -> str:
    """`unequal_twins` of a directory; empty too where it cannot be told."""
    try:
        source = open_source(path)
        return unequal_twins(source, map_parameters(source))
    except (FlashNormError, OSError):
        return ""


def same_bytes(source: Source, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint have one dtype, one shape and the same bits."""
    places = source.where[first], source.where[second]
    if len({(place.entry.dtype, place.entry.shape) for place in places}) > 1:
        return False
    one, other = ((p.shard, len(source.shards[p.shard].raw) + p.entry.start) for p in places)
    return source.store.equal(one, other, places[0].entry.nbytes)
