"""The GPU benchmark: is every kernel right, and how fast are norm + linear and whole models?

    python -m benchmarks.gpu                 # at most 9 minutes on one card
    python -m benchmarks.gpu --resume        # goes on where that was cut
    python -m benchmarks.gpu --dry-run       # the same on a CPU, tiny: its times are nothing

It works in --work, copies what it found to --out every 15 seconds (results.json, tables.md,
summary.txt, plot.png, gpu.json, and one archive of the rest), and prints the summary last. The exit
code is 0, 1 where something of ours is wrong (it is listed and not timed), 2 for wrong arguments,
3 where not all was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu.handoff import CRASHED, RESULTS, USAGE
from benchmarks.gpu.supervise import SKIPPED, Watch, supervise

MODELS = ("llama-3.2-1b", "mistral-7b")
WORK, DRY_WORK = Path("build/gpu"), Path("build/gpu-dry")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("benchmarks.gpu", description=__doc__.splitlines()[0])
    made.add_argument("--work", type=Path, help=f"folder to work in; default {WORK}")
    made.add_argument(
        "--out",
        type=Path,
        help="folder for at most 8 files; default $OUT, or benchmarks/results/gpu-CARD-DATE",
    )
    made.add_argument("--minutes", type=float, default=9.0, help="of wall clock, for all of it")
    made.add_argument("--rounds", type=int, help="of every norm + linear; default 15, dry 1")
    made.add_argument("--resume", action="store_true", help="go on where --work was cut")
    made.add_argument("--tune", action="store_true", help="measure launches and crossovers first")
    made.add_argument("--stages", nargs="+", default=[], help="only these: checks decode few-rows")
    made.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    made.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: times are nothing")
    made.add_argument(
        "--simulate", action="store_true", help="a dry run by the clock of a card (schedule.py)"
    )
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)  # seconds since the epoch
    return made


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    args = parser().parse_args(given)
    args.dry_run = args.dry_run or args.simulate
    args.work = args.work or (DRY_WORK if args.dry_run else WORK)
    if args.worker:
        return _work(args)
    dry = args.work / "out" if args.dry_run else None
    out = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else dry)
    if (args.work / RESULTS).exists() and not args.resume:
        print(f"{args.work / RESULTS} exists: give --resume to go on, or another --work")
        return USAGE
    return supervise(Watch(args.work, out, args.minutes * 60), given, args.resume)


def _work(args: argparse.Namespace) -> int:
    """Measure, in a process of its own."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here waits for a network
    from benchmarks.gpu import worker
    from benchmarks.gpu.records import Settings

    worker.die_with(os.getppid())
    settings = Settings(
        work=args.work,
        device="cpu" if args.dry_run else "cuda",
        seconds=args.minutes * 60 if args.simulate else args.until - time.time(),
        rounds=args.rounds or (1 if args.dry_run else 15),
        tune=args.tune,
        dry=args.dry_run,
        stages=tuple(args.stages),
        models=tuple(args.models),
    )
    try:
        _need_a_gpu(settings.device)
        skipped = json.loads(os.environ.get(SKIPPED, "{}"))
        return worker.work(settings, args.resume, args.simulate, skipped)
    except SystemExit as usage:
        print(usage.code, flush=True)
        return USAGE
    except Exception:
        traceback.print_exc()
        return CRASHED


def _need_a_gpu(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --dry-run shows the script on a CPU")


if __name__ == "__main__":
    raise SystemExit(main())
