"""fold_checkpoint: the plan of a model, applied to its checkpoint on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import flashnorm
from flashnorm.algebra import subnormal_warning
from flashnorm.checkpoint.cluster import Engine, runner
from flashnorm.checkpoint.config import STRICT_NOTE, check_not_folded, check_not_quantized
from flashnorm.checkpoint.inspection import inspect_stored
from flashnorm.checkpoint.jobs import Runner
from flashnorm.checkpoint.layout import Layout, Shard
from flashnorm.checkpoint.parts import Part
from flashnorm.checkpoint.places import Opened, Work, check_places, open_work, opened
from flashnorm.checkpoint.remote import Remote, place_of
from flashnorm.checkpoint.source import CONFIG, INDEX, Source, read_config
from flashnorm.checkpoint.stream import Meter, Progress
from flashnorm.checkpoint.target import plan_target
from flashnorm.checkpoint.values import Values
from flashnorm.checkpoint.workdir import Workdir
from flashnorm.content import why_damaged
from flashnorm.deprecated import takes_old_options
from flashnorm.errors import CheckpointError
from flashnorm.extras import need
from flashnorm.graph.ambient import on_cpu
from flashnorm.plan import Plan
from flashnorm.warning import warn

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@takes_old_options
@on_cpu()
def fold_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    strict: bool = False,
    untie: bool = False,
    center: bool = False,
    example_inputs: Any = None,
    progress: Progress | None = None,
    engine: Engine = "local",
    ray_address: str | None = None,
) -> Plan:
    """Write to `dst` the checkpoint `src` with its gains folded: E1, `W* = W diag(g)`, streamed.

    `src` is a directory with config.json and safetensors, or a GGUF file, which transformers first
    dequantizes. Every shard is read and written once, block by block; what does not change is
    copied byte for byte, under the same shard names, order and dtypes. Folded gains are written at
    the value where they are one (compat), which every engine reads, or removed with `strict=True`,
    which transformers reads, and engines with our plugin: a warning says so, and the marker in
    config.json. `untie=True` gives a tied head a copy of its own, so that the final gain folds too;
    `center=True` centers what LayerNorms read (E3), so that an engine may run them as RMSNorms.
    Both are asked of
    `flashnorm.inspect`, with the `example_inputs`; where a `plan` is given, it decides, but for
    its cancellings, which take a model in memory. A norm's bias goes into its readers' (E2) or
    stays as β/g (E13). `progress` is called with (bytes done, bytes in total, shard name).

    Where nothing folds, `dst` is a copy of `src` without a marker, and a warning says so.

    `dst` must not exist; it appears complete, by one rename. A killed run goes on where it stopped
    when it is started again, and ends with the same bytes. Returns the plan that was applied.

    `src` and `dst` may be URLs of an object store that fsspec knows (`s3://bucket/name`); such a
    target is complete once it has its config.json, which is written last. `engine="ray"` makes
    every shard a task of the Ray cluster at `ray_address` (else RAY_ADDRESS, else this machine):
    the same bytes.

    Raises CheckpointError where the source is not sound, folded already, or has not the tensors of
    the plan, where the target is taken or the disk too small, and where a store or a cluster cannot
    be reached; QuantizedError for quantized weights; FoldError where a folded weight would overflow
    its dtype. Nothing is left behind then. ValueError for an engine that there is not.
    """
    need("fold_checkpoint", "transformers", "filelock")
    run: Runner[int] = runner(engine, ray_address)
    source, target = place_of(os.fspath(src)), place_of(os.fspath(dst))
    check_places(source, target)

    def planned(opened: Source) -> Plan:
        if plan is not None:
            return plan
        return inspect_stored(
            opened.path, example_inputs, untie=untie, center=center, stored=opened
        )

    with opened(source, target) as place:
        return _fold(place, target, planned, strict, run, progress)


def _fold(
    place: Opened,
    target: Path | Remote,
    planned: Callable[[Source], Plan],
    strict: bool,
    run: Runner[int],
    progress: Progress | None,
) -> Plan:
    path, config = place.path, read_config(place.path)
    check_not_folded(config)
    check_not_quantized(config)
    source = place.read()
    plan = planned(source)
    goal = plan_target(source, plan, strict=strict, name=place.name)
    layout, copies = goal.layout, goal.copies
    facts = _facts(source, copies)
    mark = _fingerprint(facts, plan, strict)
    names = {*source.shards, *copies, *goal.written}
    with _disk_errors_explained(target, layout), open_work(target, mark, names) as work:
        _check_space(work, path, layout, copies)
        lost = _write_shards(work, source, layout, goal.values, run, progress)
        for file in copies:
            work.copy(path / file, file)
        for file, value in goal.written.items():
            work.write_json(file, value)
        if facts != _facts(source, copies):
            raise CheckpointError(f"{path} changed while it was being read: start again")
        work.publish()
    _warn(plan, goal.values, lost)
    _warn_of_readers(layout, path, copies)
    return plan


def _write_shards(
    work: Work,
    source: Source,
    layout: Layout,
    values: Values,
    run: Runner[int],
    progress: Progress | None,
) -> int:
    """Write the shards that are not done yet; returns how many elements became subnormal."""
    meter = Meter(layout.total_bytes, progress)
    parts: list[Part] = []
    for shard in layout.shards:
        if work.is_done(shard.name, shard.header.file_bytes):
            meter.of(shard.name)(shard.header.file_bytes)
            continue
        facts = source.store.facts(shard.name)
        parts.append(Part(shard, source.store, facts, work.slot(shard.name)))
    if parts:
        with closing(run(parts, values, meter.of)) as written:
            for part, lost in written:
                work.finish(part.name, part.nbytes, lost)
    return sum(work.note(shard.name) for shard in layout.shards)


def _facts(source: Source, copies: tuple[str, ...]) -> list[list[Any]]:
    """Name, size and version of every file that is read."""
    names = [CONFIG, *([] if source.index is None else [INDEX]), *source.shards, *copies]
    return [[name, *source.store.facts(name)] for name in names]


def _fingerprint(facts: list[list[Any]], plan: Plan, strict: bool) -> str:
    """Changes whenever the result might: source files, plan, mode, version of flashnorm."""
    known: list[Any] = [flashnorm.__version__, strict, plan.to_json(), *facts]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _check_space(work: Work, path: Path, layout: Layout, copies: tuple[str, ...]) -> None:
    if not isinstance(work, Workdir):
        return  # a store says when it is full
    needed = sum((path / file).stat().st_size for file in copies)
    needed += sum(_missing(work, shard) for shard in layout.shards)
    free = free_bytes(work.path)
    if needed > free:
        raise CheckpointError(
            f"not enough space for {work.target}: {_size(needed)} are needed, {_size(free)} are "
            "free; make room or choose another disk"
        )


def _missing(work: Work, shard: Shard) -> int:
    size = shard.header.file_bytes
    return 0 if work.is_done(shard.name, size) else size


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`."""
    return shutil.disk_usage(path).free


@contextmanager
def _disk_errors_explained(target: Path | Remote, layout: Layout) -> Iterator[None]:
    place = target.url if isinstance(target, Remote) else target
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise CheckpointError(f"{target.name} could not be written: {error}") from error
        raise CheckpointError(
            f"the disk became full while {place} was written: {_size(layout.total_bytes)} are "
            f"needed in all; the unfinished files were removed, make room and start again"
        ) from error


def _size(count: int) -> str:
    return f"{count} bytes ({count / 1e9:.2f} GB)"


def _warn(plan: Plan, values: Values, lost: int) -> None:
    if not (plan.folded or plan.centerings):
        warn(
            "no gain of this checkpoint folds, so the target is a copy of it; flashnorm inspect "
            "says why"
        )
    elif plan.folded and all(bool((gain == 1).all()) for gain in values.gains.values()):
        warn(
            "every gain of this checkpoint is exactly one, so the fold changed no weight; it may "
            "have been folded before"
        )
    if plan.entries:
        warn(
            f"what leaves or enters {plan.entries[0].path} is not centered, because that takes an "
            "operation, which a checkpoint cannot hold: the norms behind it still need their mean"
        )
    if lost:
        warn(subnormal_warning(lost))


def _warn_of_readers(layout: Layout, source: Path, copies: tuple[str, ...]) -> None:
    """Say who cannot read what was written, and which files were no good before."""
    if removed := sorted(layout.changes.removed):
        warn(
            f"{len(removed)} folded tensors are left out, the first is {removed[0]}: {STRICT_NOTE}"
        )
    if damaged := next(filter(None, (why_damaged(source / file) for file in copies)), ""):
        warn(f"copied as it was: {damaged}")
