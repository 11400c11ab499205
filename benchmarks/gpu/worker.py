"""The process that measures: pieces in the order of the schedule, each kept as soon as it is found.

Another process watches it (`supervise`), hands its files on, and starts it again where it dies.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from benchmarks.gpu import plots, schedule, summary, tables
from benchmarks.gpu.budget import Budget, Clock, OutOfTime, Simulated
from benchmarks.gpu.environment import describe
from benchmarks.gpu.handoff import BROKEN, CUT, SUMMARY, TUNED, WRONG, Progress
from benchmarks.gpu.records import Piece, Run, Settings, Stage
from benchmarks.gpu.store import Store
from flashnorm.bench.timing import in_words


class Broken(BaseException):
    """The device answers nothing any more; another process may be able to use it."""


def work(
    settings: Settings,
    resume: bool = False,
    simulate: bool = False,
    skipped: dict[str, str] | None = None,
) -> int:
    """All stages that are asked for. Returns the exit code: 0, WRONG, CUT or BROKEN.

    skipped: why stages and pieces, by their names, are not tried.
    """
    if settings.dry:
        torch.set_num_threads(1)  # of tiny things, beside whatever else runs
    _use_caches(settings.work)
    store = Store(settings.work, resume)
    run = Run(settings, store, Budget(settings.seconds, Simulated() if simulate else Clock()))
    store.begin({**describe(settings.device), "arguments": _plain(settings)})
    store.ended.update(skipped or {})
    code = 0
    with interruptible():
        try:
            measure(run, schedule.stages(settings))
        except KeyboardInterrupt:
            store.ended["run"] = "interrupted"
        except Broken as error:
            code, store.ended["run"] = BROKEN, f"the device stopped answering: {error}"
        _write(run)
    if code:
        return code
    return WRONG if schedule.failures(run) else CUT if store.ended else 0


def _plain(settings: Settings) -> dict[str, str]:
    return {name: str(value) for name, value in vars(settings).items()}


def _use_caches(folder: Path) -> None:
    """What is compiled stays with the results, so that a later run finds it."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder.resolve() / "cache" / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve() / "cache" / "inductor"))
    os.environ.setdefault("FLASHNORM_GPU_CACHE", str(folder.resolve() / TUNED))


def measure(run: Run, stages: list[Stage]) -> None:
    """Every piece that no run has found yet, as far as its stage's time reaches."""
    for stage in stages:
        if stage.name in run.store.ended:
            continue
        try:
            with run.budget.stage(stage.seconds):
                _stage(run, stage)
        except OutOfTime as over:
            run.store.ended[stage.name] = f"out of time: {over}"
        except Exception as error:
            _failed(run, stage.name, error)
        finally:
            _write(run)
            _plot(run)


def _stage(run: Run, stage: Stage) -> None:
    if run.budget.left() <= 0:
        raise OutOfTime("0 s were left")
    Progress(stage.name, stage.name, run.budget.left()).write(run.settings.work)
    with closing(stage.pieces(run)) as pieces:
        for piece in pieces:
            if run.store.find(piece.stage, **piece.key) or str(piece) in run.store.ended:
                continue
            run.budget.check(piece.seconds)
            Progress(stage.name, str(piece), run.budget.left()).write(run.settings.work)
            _piece(run, piece)
            run.budget.clock.spend(piece.seconds)
            _write(run)


def _piece(run: Run, piece: Piece) -> None:
    """One row; what fails is said, is no row, and is tried again by a later run."""
    try:
        found = piece.measure()
    except Exception as error:
        _failed(run, str(piece), error)
        return
    run.store.put(piece.stage, piece.key, found)


def _failed(run: Run, what: str, error: Exception) -> None:
    run.store.ended[what] = in_words(error)
    run.say(f"{what} failed: {in_words(error)}")
    if run.settings.device != "cpu" and not _answers():
        raise Broken(in_words(error))


def _answers() -> bool:
    """Whether the device still works; after an illegal access it does not, in this process."""
    try:
        return bool(torch.ones(2, device="cuda").sum().item() == 2)
    except Exception:
        return False


def _write(run: Run) -> None:
    """results.json, the CSV files, tables.md and the summary."""
    store = run.store
    store.write()
    store.write_csv()
    store.write_text("tables.md", tables.markdown(store))
    store.write_text(SUMMARY, summary.text(store))


def _plot(run: Run) -> None:
    try:
        missing = plots.plot(run.store, run.settings.work / "plot.png")
    except Exception as error:
        missing = in_words(error)
    if missing and run.kept.get("no plot") != missing:
        run.kept["no plot"] = missing
        run.say(missing)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt, which nothing takes for a failure of a piece."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def die_with(parent: int) -> None:
    """End this process soon after another has: nobody would hand its results on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(CUT)

    threading.Thread(target=watch, daemon=True).start()
