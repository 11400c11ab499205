"""verify_weights: is a checkpoint, bit for bit, what a fold makes of another? No model is run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.cluster import Engine, runner
from flashnorm.checkpoint.compare import Check, Difference
from flashnorm.checkpoint.config import check_not_quantized, folded_in
from flashnorm.checkpoint.contents import (
    FileDifference,
    Matched,
    config_differences,
    file_differences,
    header_differences,
    index_differences,
    match_tensors,
    remarks,
    spelled_otherwise,
)
from flashnorm.checkpoint.gguf import gguf_file
from flashnorm.checkpoint.inspection import inspect_stored
from flashnorm.checkpoint.jobs import Runner
from flashnorm.checkpoint.source import Source, open_source
from flashnorm.checkpoint.store import Folder
from flashnorm.checkpoint.stream import Meter, Progress
from flashnorm.checkpoint.target import Target, copied_target, plan_target
from flashnorm.errors import CheckpointError
from flashnorm.graph.ambient import on_cpu
from flashnorm.plan import Plan
from flashnorm.verification.weights_report import LISTED, WeightsReport

MEASURE = "flashnorm verify without --quick measures whether it computes the same"


@on_cpu()
def verify_weights(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    example_inputs: Any = None,
    progress: Progress | None = None,
    engine: Engine = "local",
    ray_address: str | None = None,
) -> WeightsReport:
    """Prove that `candidate` is, bit for bit, what `fold_checkpoint` makes of `reference`.

    Both are directories with config.json and safetensors. What the fold was asked for (strict,
    untie, center) is read from the candidate's config.json; the plan is made anew from the
    reference, with `example_inputs` if the fold had some, or is the `plan` that the fold was given.
    Then every tensor is read once in both, block by block, and compared with what E1, E2, E13 and
    E3 make of it: `W* = W diag(g)` and so on, in memory of a few blocks. Tensors are found by name,
    in whatever files they lie. Headers, config.json, index and all other files are compared too. A
    candidate without a marker has to be a copy of the reference. `progress` is called with (bytes
    done, bytes in total, name of the file). `engine="ray"` compares every shard in a task of the
    Ray cluster at `ray_address` (else RAY_ADDRESS, else this machine): the same report.

    The report is ok where nothing differs; else it names each wrong tensor with its first wrong
    element. What it proves is the work of the fold; that the plan is right, `flashnorm.verify`
    measures.

    Raises CheckpointError where a directory is not sound, changes while it is read, or the
    candidate was folded by another tool or in another dtype; FoldError and TraceError where the
    fold would raise them.
    """
    start = time.perf_counter()
    run: Runner[tuple[Difference, ...]] = runner(engine, ray_address)
    first, second = _opened(reference), _opened(candidate)
    folded, target, notes = _expected(first, second, plan, example_inputs)
    matched = match_tensors(target, second)
    files, paper = file_differences(target, second)
    files = (*_described_differences(target, second, matched), *files)
    wrong = [*matched.differences, *_values(target, second, matched, run, progress)]
    notes += _notes(target, second, matched, paper)
    return WeightsReport(
        reference=os.fspath(reference),
        candidate=os.fspath(candidate),
        mode=_mode(target),
        folded=folded,
        compared=sum(len(shard.pieces) for _, shard in matched.shards),
        nbytes=sum(piece.entry.nbytes for _, shard in matched.shards for piece in shard.pieces),
        wrong=tuple(wrong[:LISTED]),
        wrong_count=len(wrong),
        files=files[:LISTED],
        files_count=len(files),
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def _opened(name: str | os.PathLike[str]) -> Source:
    path = Path(os.path.abspath(Path(name).expanduser()))
    if gguf_file(path):
        raise CheckpointError(
            f"{name} is a GGUF file, whose weights --quick cannot compare: {MEASURE}"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{name} is no directory: --quick compares two directories with safetensors; {MEASURE}"
        )
    try:
        return open_source(path)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _expected(
    first: Source, second: Source, plan: Plan | None, example_inputs: Any
) -> tuple[int, Target, list[str]]:
    """How many norms fold, what the candidate should hold, and what is to be said about that."""
    before, after = folded_in(first.config), folded_in(second.config)
    if before and not after:
        raise CheckpointError(
            f"{first.path} was folded already, as {before} in its config.json says, and "
            f"{second.path} was not: name the original first, then its fold"
        )
    if plan is None and (before or not after):
        why = "both were folded before" if before else "the candidate has no marker of a fold"
        return 0, copied_target(first), [f"{why}, so it was compared as a copy"]
    mark = _marker(second, after)
    check_not_quantized(first.config)
    if plan is None:
        untie, center = _is_untied(first, second), bool(mark.get("centered"))
        plan = inspect_stored(first.path, example_inputs, untie=untie, center=center)
    target = plan_target(first, plan, strict=mark["mode"] == "strict", name=first.path.name)
    _check_fold_dtype(second, mark, target)
    return len(plan.folded), target, []


def _marker(second: Source, key: str | None) -> dict[str, Any]:
    """What the candidate says of its fold."""
    mark = second.config.get("flashnorm")
    if isinstance(mark, dict) and mark.get("mode") in ("compat", "strict"):
        return mark
    if key is None:
        return {"mode": "compat"}
    raise CheckpointError(
        f"{second.path} was folded by another tool, as {key} in its config.json says, so what its "
        f"weights should be cannot be told: {MEASURE}"
    )


def _is_untied(first: Source, second: Source) -> bool:
    tied = [source.config.get("tie_word_embeddings") for source in (first, second)]
    return tied[0] is not False and tied[1] is False


def _check_fold_dtype(second: Source, mark: dict[str, Any], target: Target) -> None:
    wanted = target.config.get("flashnorm", {}).get("fold_dtype")
    found = mark.get("fold_dtype", wanted)
    if wanted is not None and found != wanted:
        raise CheckpointError(
            f"{second.path} was folded in {found}, as its config.json says, and this version folds "
            f"it in {wanted}, which rounds otherwise: {MEASURE}"
        )


def _mode(target: Target) -> str:
    return str(target.config.get("flashnorm", {}).get("mode", "copy"))


def _values(
    target: Target,
    second: Source,
    matched: Matched,
    run: Runner[tuple[Difference, ...]],
    progress: Progress | None,
) -> Iterator[Difference]:
    """Every tensor that is stored as it should be, but holds other numbers."""
    folders = Folder(target.source.path), Folder(second.path)
    checks = [
        Check(shard, *folders, file, (folders[0].facts(shard.name), folders[1].facts(file)))
        for file, shard in matched.shards
    ]
    if not checks:
        return
    meter = Meter(sum(check.nbytes for check in checks), progress)
    with closing(run(checks, target.values, meter.of)) as done:
        found = {id(check): differences for check, differences in done}
    for check in checks:
        yield from found[id(check)]


def _described_differences(
    target: Target, second: Source, matched: Matched
) -> Iterator[FileDifference]:
    yield from config_differences(target, second)
    if not matched.moved:
        yield from index_differences(target, second)
        yield from header_differences(target, second)


def _notes(
    target: Target, second: Source, matched: Matched, paper: tuple[str, ...]
) -> Iterator[str]:
    yield from remarks(target, second)
    if matched.moved:
        yield "tensors lie in other files than the fold would put them, and were found by name"
    else:
        for name in islice(spelled_otherwise(target, second), 3):
            yield f"the header of {name} has another order, or other spaces, than the fold's"
    if paper:
        yield f"{', '.join(paper[:3])}: not as the reference's, and no reader of a model reads it"
