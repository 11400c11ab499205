"""fold_adapter: an adapter that was trained on the original base, made to fit the folded one."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashnorm.adapters.base import check_folded, check_plan, open_base
from flashnorm.adapters.biases import add_biases
from flashnorm.adapters.config import (
    CONFIG,
    WEIGHTS,
    PathName,
    check_plain_lora,
    folded_adapter_config,
    read_adapter_config,
)
from flashnorm.adapters.edits import Case, Edits, center, fold_gains, refuse_copies
from flashnorm.adapters.tensors import AdapterTensors, read_tensors
from flashnorm.adapters.weights import entries, load, new_entries, open_weights, write_weights
from flashnorm.algebra import subnormal_warning
from flashnorm.checkpoint.files import copy_file, other_files
from flashnorm.checkpoint.source import Source
from flashnorm.checkpoint.workdir import check_target, open_workdir
from flashnorm.errors import CheckpointError
from flashnorm.extras import need
from flashnorm.graph.ambient import on_cpu
from flashnorm.inspection import inspect
from flashnorm.plan import Plan

NOTHING = (
    "nothing that this adapter acts on is changed by the fold, so it fits both bases; the target "
    "is a copy of it"
)


@dataclass(frozen=True)
class AdapterFold:
    """What `fold_adapter` did: the targets in all, the tensors that changed, and those added."""

    targets: int
    changed: tuple[str, ...]
    added: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dict."""
        return asdict(self)


@on_cpu()
def fold_adapter(
    adapter: PathName,
    plan: Plan | None,
    out: PathName,
    *,
    base: PathName | None = None,
    folded: PathName | None = None,
) -> AdapterFold:
    """Write to `out` the LoRA adapter for the folded base: E14, `A* = A diag(g)`, B as it is.

    `delta = scaling · B A`, A: [r, in], B: [out, r]. Where the plan folds the bias β of a norm into
    the target's (E2), B gets the bias `B A β` (PEFT's lora_bias); where it centers the target (E3),
    `B* = B − mean over out`. Parameters that the adapter holds whole (modules_to_save, trained
    biases) become what the fold makes of the base's. Dtypes stay; a tensor is rounded once.

    `adapter` is a directory of PEFT. `plan` is the one that the base was folded by; None makes it
    from the base. `base` is the directory of the original base, from which the gains are read; left
    out, it is the local directory that the adapter names. `folded` is the directory of the folded
    base, which is checked against the plan and named in the new adapter_config.json; left out, that
    names no base, so that nothing loads the new adapter onto the old one.

    It is exact in eval. In training, dropout on the input of A acts on each feature alone, so gains
    are exact then too; only the bias of E2 is not dropped out any more.

    An adapter of which nothing changes is copied without a marker, and a warning says so. `out`
    must not exist; it appears complete, by one rename, and an error leaves nothing behind.

    Raises CheckpointError for what is no plain LoRA (DoRA, other types), is folded already, does
    not fit the base, or could not be exact; FoldError where a tensor would overflow its dtype.
    Source: FlashNorm, arXiv 2407.09577; LoRA, arXiv 2106.09685.
    """
    need("fold_adapter", "transformers", "filelock")
    source, target = Path(os.path.abspath(adapter)), Path(os.path.abspath(out))
    config = read_adapter_config(source)
    check_target(source, target)
    check_plain_lora(config)
    weights = open_weights(source)
    original = open_base(base, config)
    plan = inspect(original.name) if plan is None else plan
    check_plan(plan, original)
    if folded is not None:
        check_folded(Path(folded), plan)
    canonical = original.canonical(plan)
    tensors = read_tensors(entries(weights), config, original, canonical)
    case = Case(config, tensors, plan, original, canonical, lambda part: load(weights, part.entry))
    edits = _edits(case)
    done = _summary(weights, tensors, edits)
    if done.changed or done.added:
        config = folded_adapter_config(
            config, plan, base=original.name, folded=folded, lora_bias=bool(edits.biases)
        )
    try:
        lost = _write(weights, edits, config, target)
    except OSError as error:
        raise CheckpointError(f"{target.name} could not be written: {error}") from error
    if not done.changed and not done.added:
        warnings.warn(NOTHING, stacklevel=3)
    if lost:
        warnings.warn(subnormal_warning(lost), stacklevel=3)
    return done


def _edits(case: Case) -> Edits:
    """What every tensor goes through: biases, gains, then centering."""
    refuse_copies(case)
    edits = Edits()
    add_biases(case, edits)
    fold_gains(case, edits)
    center(case, edits)
    return edits


def _summary(weights: Source, tensors: AdapterTensors, edits: Edits) -> AdapterFold:
    return AdapterFold(
        targets=len(tensors.loras),
        changed=tuple(e.name for e in entries(weights) if e.name in edits.by_key),
        added=tuple(entry.name for entry in new_entries(weights, edits)),
    )


def _write(weights: Source, edits: Edits, config: dict[str, Any], target: Path) -> int:
    """Write all files beside `target` and rename; returns how many elements became subnormal."""
    files = other_files(weights.path, {CONFIG, WEIGHTS})
    # A fingerprint of its own: an adapter is small, so an interrupted run starts over.
    with open_workdir(target, uuid.uuid4().hex) as work:
        try:
            file = work.slot(WEIGHTS).path
            lost = write_weights(file, weights, edits)
            work.finish(WEIGHTS, file.stat().st_size)
            for name in files:
                if os.sep not in name:  # directories hold other adapters, or states of training
                    copy_file(weights.path / name, work.path / name)
            work.write_json(CONFIG, config)
            work.publish()
        except KeyboardInterrupt:
            shutil.rmtree(work.path, ignore_errors=True)
            raise
    return lost
