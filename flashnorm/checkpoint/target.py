"""All that a fold of a checkpoint holds, decided before any of it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashnorm.checkpoint.config import folded_config
from flashnorm.checkpoint.files import other_files, weight_files
from flashnorm.checkpoint.layout import Layout, copied_layout, left_out, plan_layout
from flashnorm.checkpoint.source import CONFIG, INDEX, Source
from flashnorm.checkpoint.stream import check_twins
from flashnorm.checkpoint.values import Values
from flashnorm.plan import Plan


@dataclass(frozen=True)
class Target:
    """The files of a folded checkpoint: tensors by `layout` and `values`, JSON files that are
    written anew by name, and the names of those that are copied from the source."""

    source: Source
    layout: Layout
    values: Values
    written: dict[str, Any]
    copies: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says after the fold."""
        return self.written.get(CONFIG, self.source.config)

    @property
    def index(self) -> dict[str, Any] | None:
        """What the index says after the fold; None where one file holds all tensors."""
        return self.written.get(INDEX, self.source.index)


def plan_target(source: Source, plan: Plan, *, strict: bool, name: str) -> Target:
    """What `plan` makes of a checkpoint, which the marker will call `name`.

    Raises CheckpointError where they do not fit, or where tied weights differ.
    """
    layout = plan_layout(source, plan, strict=strict)
    check_twins(source, layout)
    values = Values(source, plan, layout.changes)
    written: dict[str, Any] = {}
    if plan.folded or plan.centerings:
        absent = left_out(source, plan, layout.changes) if strict else None
        written[CONFIG] = folded_config(
            source.config, plan, absent=absent, fold_dtype=_fold_dtype(values), source=name
        )
    if layout.index is not None:
        written[INDEX] = layout.index
    copies = other_files(source.path, {*written, *source.shards})
    return Target(source, layout, values, written, copies)


def copied_target(source: Source) -> Target:
    """A copy of a checkpoint of any kind, in which nothing folds."""
    layout = copied_layout(source)
    values = Values(source, Plan(()), layout.changes)
    copies = {*other_files(source.path, set()), *weight_files(source.path)} - {*source.shards}
    return Target(source, layout, values, {}, tuple(sorted(copies)))


def _fold_dtype(values: Values) -> str:
    """The dtype in which weights meet gains."""
    wide = any(gain.dtype == torch.float64 for gain in values.gains.values())
    return "float64" if wide else "float32"
