"""fold_checkpoint: the plan of a model, applied to its checkpoint on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flashnorm
from flashnorm.algebra import subnormal_warning
from flashnorm.checkpoint.config import STRICT_NOTE, check_not_folded, check_not_quantized
from flashnorm.checkpoint.files import copy_file
from flashnorm.checkpoint.gguf import dequantized, gguf_file
from flashnorm.checkpoint.inspection import inspect_stored
from flashnorm.checkpoint.layout import Layout, Shard
from flashnorm.checkpoint.source import CONFIG, Source, open_source, read_config
from flashnorm.checkpoint.stream import Meter, Progress, write_shard
from flashnorm.checkpoint.target import plan_target
from flashnorm.checkpoint.values import Values
from flashnorm.checkpoint.workdir import Workdir, check_target, open_workdir
from flashnorm.content import why_damaged
from flashnorm.deprecated import takes_old_options
from flashnorm.errors import CheckpointError
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

    Raises CheckpointError where the source is not sound, folded already, or has not the tensors of
    the plan, and where the target is taken or the disk too small; QuantizedError for quantized
    weights; FoldError where a folded weight would overflow its dtype. Nothing is left behind then.
    """
    source, target = Path(os.path.abspath(src)), Path(os.path.abspath(dst))
    check_target(source, target)

    def planned(path: Path) -> Plan:
        if plan is not None:
            return plan
        return inspect_stored(path, example_inputs, untie=untie, center=center)

    if file := gguf_file(source):
        with dequantized(file, target) as directory:
            return _fold(directory, target, file.name, planned, strict, progress)
    return _fold(source, target, source.name, planned, strict, progress)


def _fold(
    path: Path,
    target: Path,
    name: str,
    planned: Callable[[Path], Plan],
    strict: bool,
    progress: Progress | None,
) -> Plan:
    config = read_config(path)
    check_not_folded(config)
    check_not_quantized(config)
    source = open_source(path)
    plan = planned(path)
    goal = plan_target(source, plan, strict=strict, name=name)
    layout, copies = goal.layout, goal.copies
    mark = _fingerprint(source, plan, strict, copies)
    with _disk_errors_explained(target, layout), open_workdir(target, mark) as work:
        _check_space(work, path, layout, copies)
        lost = _write_shards(work, source, layout, goal.values, progress)
        for file in copies:
            copy_file(path / file, work.path / file)
        for file, value in goal.written.items():
            work.write_json(file, value)
        work.publish()
    _warn(plan, goal.values, lost)
    _warn_of_readers(layout, path, copies)
    return plan


def _write_shards(
    work: Workdir, source: Source, layout: Layout, values: Values, progress: Progress | None
) -> int:
    """Write the shards that are not done yet; returns how many elements became subnormal."""
    meter = Meter(layout.total_bytes, progress)
    for shard in layout.shards:
        report = meter.of(shard.name)
        if work.is_done(shard.name, shard.header.file_bytes):
            report(shard.header.file_bytes)
            continue
        lost = write_shard(
            source.path / shard.name, work.temporary(shard.name), shard, values, report
        )
        work.finish(shard.name, lost)
    return sum(work.note(shard.name) for shard in layout.shards)


def _fingerprint(source: Source, plan: Plan, strict: bool, copies: tuple[str, ...]) -> str:
    """Changes whenever the result might: source files, plan, mode, version of flashnorm."""
    stats = {name: (source.path / name).stat() for name in [CONFIG, *source.shards, *copies]}
    facts: list[Any] = [flashnorm.__version__, strict, plan.to_json()]
    facts += [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _check_space(work: Workdir, path: Path, layout: Layout, copies: tuple[str, ...]) -> None:
    needed = sum((path / file).stat().st_size for file in copies)
    needed += sum(_missing(work, shard) for shard in layout.shards)
    free = free_bytes(work.path)
    if needed > free:
        raise CheckpointError(
            f"not enough space for {work.target}: {_size(needed)} are needed, {_size(free)} are "
            "free; make room or choose another disk"
        )


def _missing(work: Workdir, shard: Shard) -> int:
    size = shard.header.file_bytes
    return 0 if work.is_done(shard.name, size) else size


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`."""
    return shutil.disk_usage(path).free


@contextmanager
def _disk_errors_explained(target: Path, layout: Layout) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise CheckpointError(f"{target.name} could not be written: {error}") from error
        raise CheckpointError(
            f"the disk became full while {target} was written: {_size(layout.total_bytes)} are "
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
