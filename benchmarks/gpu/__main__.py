"""The GPU benchmark: is every kernel right, and how fast are norm + linear and whole models?

    python -m benchmarks.gpu                                    # at most 8 minutes on one card
    python -m benchmarks.gpu --out benchmarks/results/gpu-h200-2026-11-22 --resume

Writes results.json, a CSV per stage, tables.md and plot.png into --out after every stage. A run
that is cut, by its time or by SIGTERM, prints what it has; --resume goes on from there. The exit
code is 0, 1 where a kernel is wrong (it is listed and not timed), 3 where a stage did not end.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import correctness, models, operations, plots, scaled, tables, tune
from benchmarks.gpu.budget import Budget, OutOfTime, interruptible
from benchmarks.gpu.environment import environment
from benchmarks.gpu.nouns import Run, Settings
from benchmarks.gpu.store import Store
from benchmarks.model_shapes import CONFIGURATIONS
from flashnorm.bench.timing import in_words

RESULTS = Path("benchmarks/results")
WRONG, CUT = 1, 3
# Parts of a run's time that the stages may take; what one leaves is the next one's.
SHARES = {"correctness": 0.2, "tune": 0.25, "operations": 0.32, "model": 0.3, "scaled": 0.1}
Stage = Callable[[Run], None]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results/gpu-CARD-DATE")
    parser.add_argument("--minutes", type=float, default=8.0, help="of wall clock, for all of it")
    parser.add_argument("--rounds", type=int, default=15, help="of every norm + linear")
    parser.add_argument("--resume", action="store_true", help="go on where --out was cut")
    parser.add_argument("--tune", action="store_true", help="measure launches and crossovers first")
    parser.add_argument("--stages", nargs="+", help="only these: correctness operations model ...")
    parser.add_argument("--models", nargs="+", choices=list(CONFIGURATIONS))
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny, on the CPU: times are nothing"
    )
    return parser.parse_args(given)


def settings_of(args: argparse.Namespace) -> Settings:
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --dry-run shows the script on a CPU")
    default = RESULTS / f"gpu-{card(args.dry_run)}-{date.today()}"
    names = ("tiny",) if args.dry_run else ("llama-3.2-1b", "mistral-7b")
    return Settings(
        out=args.out or default,
        device="cpu" if args.dry_run else "cuda",
        minutes=args.minutes,
        rounds=1 if args.dry_run else args.rounds,
        tune=args.tune,
        dry=args.dry_run,
        stages=tuple(args.stages or ()),
        models=tuple(args.models or names),
    )


def card(dry: bool) -> str:
    """The card's name for a folder."""
    name = "dry-run" if dry else torch.cuda.get_device_name(0)
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def stages(settings: Settings) -> dict[str, tuple[Stage, float]]:
    """Name, function and seconds of all that was asked for, in order."""
    seconds = settings.minutes * 60
    found: dict[str, tuple[Stage, float]] = {
        "correctness": (correctness.correctness, SHARES["correctness"] * seconds)
    }
    if settings.tune:
        found["tune"] = (tune.tune, SHARES["tune"] * seconds)
    found["operations"] = (operations.operations, SHARES["operations"] * seconds)
    for name in settings.models:
        found[f"model {name}"] = (partial(models.model, name=name), SHARES["model"] * seconds)
    found["scaled"] = (scaled.scaled, SHARES["scaled"] * seconds)
    asked = settings.stages
    return {name: each for name, each in found.items() if not asked or name.split()[0] in asked}


def execute(run: Run) -> int:
    """All stages; what each has found is on disk when it ends, however it ends."""
    environment(run)
    cut = False
    for name, (stage, seconds) in stages(run.settings).items():
        try:
            with run.budget.stage(seconds):
                stage(run)
        except OutOfTime as over:
            cut, run.store.ended[name] = True, f"out of time: {over}"
        except Exception as error:
            cut, run.store.ended[name] = True, in_words(error)
            run.say(f"{name} failed: {in_words(error)}")
        except KeyboardInterrupt:
            run.store.ended[name] = "interrupted"
            cut = True
            break
        finally:
            write(run.store)
    if correctness.failures(run) or _excluded(run) or scaled.failures(run):
        return WRONG
    return CUT if cut else 0


def _excluded(run: Run) -> bool:
    return any(row["excluded"] for row in run.store.rows(operations.STAGE))


def write(store: Store) -> None:
    """results.json, the CSV files, tables.md and plot.png."""
    store.write()
    store.write_csv()
    (store.folder / "tables.md").write_text(tables.markdown(store), "utf-8")
    if missing := plots.plot(store, store.folder / "plot.png"):
        print(missing)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    settings = settings_of(args)
    run = Run(settings, Store(settings.out, args.resume), Budget(settings.minutes * 60))
    measured = settings.out / tune.FILE
    if settings.tune or measured.exists():
        os.environ["FLASHNORM_GPU_CACHE"] = str(measured)
    with interruptible(run.budget):
        code = execute(run)
    print(tables.markdown(run.store))
    print(f"written to {settings.out}; exit code {code}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
