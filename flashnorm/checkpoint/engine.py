"""A checkpoint as an engine loads it: tensor by tensor, folded on the way, nothing written.

An engine asks for (name, tensor) pairs and puts them where it wants them, in shards or fused. So a
fold belongs before that: every tensor is here what `fold_checkpoint` would have written, bit for
bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flashnorm import algebra
from flashnorm.checkpoint.config import check_not_folded, check_not_quantized
from flashnorm.checkpoint.header import FLOAT_DTYPES
from flashnorm.checkpoint.inspection import inspect_stored
from flashnorm.checkpoint.layout import Layout, plan_layout
from flashnorm.checkpoint.source import Place, Source, open_source
from flashnorm.checkpoint.stream import check_twins
from flashnorm.checkpoint.values import Values, load_tensor
from flashnorm.errors import CheckpointError
from flashnorm.graph.ambient import on_cpu
from flashnorm.marker import absent_tensors, folded_by, is_strict
from flashnorm.plan import Plan
from flashnorm.warning import warn

AGAIN = (
    "{} was folded with strict by a version of flashnorm that did not store the shapes of what it "
    "left out: fold the original again, or without strict"
)


@dataclass(frozen=True)
class Streamed:
    """A checkpoint opened for an engine.

    `plan` is what folds on the way; None where the checkpoint was folded before. `absent` are the
    gains that a strict fold left out, each with its shape, dtype and value. `untied` says that the
    head has a weight of its own, of which the config does not know.
    """

    path: Path
    source: Source
    plan: Plan | None
    layout: Layout | None
    absent: dict[str, tuple[tuple[int, ...], torch.dtype, float]]

    @property
    def untied(self) -> bool:
        return self.plan is not None and bool(self.plan.untied)

    @property
    def folded(self) -> int:
        """How many norms fold while loading."""
        return 0 if self.plan is None else len(self.plan.folded)

    def __str__(self) -> str:
        if self.plan is not None:
            return f"{self.folded} of {len(self.plan.sites)} norms are folded while loading"
        if self.absent:
            return f"folded before; {len(self.absent)} gains that it leaves out are put back"
        return "folded before"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of each tensor, on the CPU, in the order of the shards.

        A value may lie on a mapping of its file: whoever keeps one copies it.
        """
        if self.layout is None or self.plan is None:
            for name in self.source.shards:
                yield from _stored(self.path / name)
        else:
            yield from _folded(self.source, self.plan, self.layout)
        for name, (shape, dtype, value) in self.absent.items():
            yield name, torch.full(shape, value, dtype=dtype)


@on_cpu()
def open_streamed(path: Path, *, untie: bool = False, plan: Plan | None = None) -> Streamed:
    """Open the checkpoint directory `path` for an engine, which folds it on the way if it is plain.

    E1, `W* = W diag(g)`, as `fold_checkpoint` does it; a checkpoint that was folded before comes as
    it is, with gains that a strict fold left out at the value where they are one. `untie` gives a
    tied head a weight of its own, so that the final norm folds too: the engine has to be told.

    Raises CheckpointError where the directory is not sound, was folded by another tool or by an old
    strict fold; QuantizedError where its weights are quantized.
    """
    source = open_source(path)
    if key := folded_by(source.config):
        return Streamed(path, source, None, None, absent_gains(path, source, key))
    check_not_folded(source.config)  # which asks the configs of sub-models too
    check_not_quantized(source.config)
    found = inspect_stored(path, untie=untie) if plan is None else plan
    layout = plan_layout(source, found, strict=False)
    check_twins(source, layout)
    return Streamed(path, source, found, layout, {})


def absent_gains(
    path: Path, source: Source, key: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
    """What a fold by flashnorm left out, each with its shape, dtype and value.

    Raises CheckpointError where another tool folded it, or the marker does not say, or says what
    cannot be.
    """
    config = source.config
    marked = config.get("flashnorm")
    if not isinstance(marked, dict):
        raise CheckpointError(
            f"{path.name} was folded by another tool, as {key} in its config.json says: load it as "
            "that tool says, or fold the original by flashnorm"
        )
    if not is_strict(config):
        return {}
    found = absent_tensors(marked)
    if found is None:
        raise CheckpointError(AGAIN.format(path.name))
    for name, (shape, dtype, _) in found.items():
        largest = max((place.entry.numel for place in source.where.values()), default=0)
        if dtype not in FLOAT_DTYPES or math.prod(shape) > largest or name in source.where:
            raise CheckpointError(
                f"the marker in config.json of {path.name} says that {name} was left out, as "
                f"{dtype} of shape {list(shape)}, which cannot be: fold the original again"
            )
    return {
        name: (shape, FLOAT_DTYPES[dtype], value) for name, (shape, dtype, value) in found.items()
    }


def _stored(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def _folded(source: Source, plan: Plan, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    values, lost = Values(source, plan, layout.changes), 0
    copied = {copy.tensor: copy.source for copy in layout.changes.copies}
    for shard in layout.shards:
        with safe_open(source.path / shard.name, "pt") as opened:
            for piece in shard.pieces:
                name = piece.entry.name
                if piece.is_copy:
                    yield name, opened.get_tensor(copied.get(name, name))
                elif piece.small:
                    yield name, values.tensor(name)
                else:
                    value = load_tensor(source, Place(shard.name, piece.entry))
                    lost += values.rewrite_(name, value, piece.absorbs, piece.center)
                    yield name, value
    if lost:
        warn(algebra.subnormal_warning(lost))
