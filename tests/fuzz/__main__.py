"""`python -m tests.fuzz --count 20000 --seed 0`: random models, and every counterexample small."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator

from tests.fuzz.examine import examine, one_thread
from tests.fuzz.oracle import Verdict
from tests.fuzz.tally import Tally


def verdicts(examine: Callable[[int], Verdict], seeds: range, jobs: int) -> Iterator[Verdict]:
    if jobs == 1:
        yield from map(examine, seeds)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=one_thread) as pool:
        yield from pool.imap(examine, seeds, chunksize=8)


def _examiner(disk: bool) -> Callable[[int], Verdict]:
    if not disk:
        return examine
    from tests.fuzz.disk import examine_disk

    return examine_disk


def main() -> int:
    options = _arguments()
    one_thread()
    tally, start = Tally(), time.monotonic()
    done = options.seed
    seeds = range(options.seed, options.seed + options.count)
    for verdict in verdicts(_examiner(options.disk), seeds, options.jobs):
        tally.add(verdict)
        done = verdict.seed + 1
        if verdict.wrong:
            print(f"\n{verdict.detail}", file=sys.stderr, flush=True)
        spent = time.monotonic() - start
        if (done - options.seed) % 100 == 0:
            said = f"{done - options.seed} of {options.count}, {len(tally.wrong)} wrong"
            print(f"{said}, {spent:.0f} s", file=sys.stderr, flush=True)
        if options.minutes and spent > 60 * options.minutes:
            break
    print(json.dumps(tally.to_json()) if options.json else tally)
    if done < options.seed + options.count:
        left = options.seed + options.count - done
        print(f"go on with --seed {done} --count {left}", file=sys.stderr)
    return int(bool(tally.wrong))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20000, help="how many models")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first one")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, help="stop after that long, and say where")
    parser.add_argument("--disk", action="store_true", help="checkpoints of random configs instead")
    parser.add_argument("--json", action="store_true", help="the counts as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
