"""`python -m tests.attacks --count 100000`: damaged files against everything that reads them.

Ends with 1 where an attack crashed, did not end, took too much memory, or wrote beside the target.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.attacks.run import ATTACKS, Tally, drawn, run
from tests.attacks.sandbox import Sandbox
from tests.attacks.targets import QUICK
from tests.attacks.whole import WHOLE

SHARED_MEMORY = Path("/dev/shm")  # where there is one, nothing has to wait for a disk
MEMORY = 6 << 30  # bytes of addresses beyond those at the start: more is a finding


def main() -> int:
    options = _arguments()
    where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="attacks-", dir=where) as place:
        box = Sandbox.at(Path(place))
        _ = box.good
        _limit_memory()
        done, tally = _run(options, box)
    left = options.seed + options.count - done
    print(json.dumps({"seed": options.seed, **tally.to_json()}, indent=1))
    if left:
        print(f"go on with --seed {done} --count {left}", file=sys.stderr)
    return int(bool(tally.findings))


def _run(options: argparse.Namespace, box: Sandbox) -> tuple[int, Tally]:
    names = {"quick": QUICK, "whole": WHOLE, "all": ATTACKS}[options.targets]
    seeds = range(options.seed, options.seed + options.count)
    done, tally, said = options.seed, Tally(), time.monotonic()
    for seed, tally in run(seeds, box, names):
        done = seed + 1
        if time.monotonic() - said > 30 or done == seeds.stop:
            said = time.monotonic()
            found = f"{len(tally.findings)} findings, {tally.seconds:.0f} s"
            print(f"{done - options.seed} of {options.count}, {found}", file=sys.stderr, flush=True)
        if options.seconds and tally.seconds > options.seconds:
            break
    for finding, hits in tally.findings.items():
        again = f"--seed {hits[0]} --count 1 --targets {options.targets}"
        print(f"{finding} ({len(hits)}x, {again}: {drawn(hits[0], names)})", file=sys.stderr)
    return done, tally


def _limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="how many attacks")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first one")
    parser.add_argument("--seconds", type=float, help="stop after that long, and say where")
    parser.add_argument("--targets", choices=("all", "quick", "whole"), default="all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
