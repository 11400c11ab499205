"""How fast `fold --engine ray` is with one worker and with two, beside the local engine.

Writes a synthetic Llama-shaped checkpoint (bf16) into a work directory and folds it in turn: by the
local engine, on a Ray cluster with one worker, and with two. Every worker is a node of this machine
with one processor, held to a core of its own; the local engine is given once the first core alone,
and once all. Workers have folded something before they are timed; every result is compared with the
local engine's first one, byte for byte. Prints a table and writes
benchmarks/results/cluster-<machine>-<date>.json. The work directory is removed at the end.

    python -m benchmarks.cluster --workdir /path/on/the/disk --gigabytes 4 --rounds 5

Both workers share the disk and the memory of this machine, which two machines would not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.streaming import (
    drop_cache,
    hashes,
    layers_for,
    llama_plan,
    machine,
    make_checkpoint,
)
from flashnorm import fold_checkpoint
from flashnorm.plan import Plan

SIDES = ("local, one core", "local, all cores", "ray, 1 worker", "ray, 2 workers")
SHARD_BYTES = int(2e8)


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """This process, and those that it starts meanwhile, on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def workers(count: int) -> Iterator[None]:
    """A connection to a cluster of so many workers, each on a core of its own."""
    import ray
    from ray.cluster_utils import Cluster

    cores = sorted(os.sched_getaffinity(0))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for core in cores[:count]:
            with on_cores({core}):
                made.add_node(num_cpus=1)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def timed(work: Path, plan: Plan, engine: str, warm: bool) -> float:
    """Seconds of one fold into `dst`, which is there afterwards."""
    os.sync()
    if not warm:
        drop_cache(work / "src")
    start = time.perf_counter()
    fold_checkpoint(work / "src", work / "dst", plan=plan, engine=engine)  # type: ignore[arg-type]
    return time.perf_counter() - start


def run(side: str, work: Path, plans: dict[str, Plan], warm: bool) -> float:
    if side.startswith("local"):
        cores = sorted(os.sched_getaffinity(0))
        with on_cores({cores[0]} if "one" in side else {*cores}):
            return timed(work, plans["src"], "local", warm)
    with workers(int(side.split()[1])):
        fold_checkpoint(work / "small", work / "warm", plan=plans["small"], engine="ray")
        shutil.rmtree(work / "warm")
        return timed(work, plans["src"], "ray", warm)


def rounds(work: Path, plans: dict[str, Plan], count: int, warm: bool) -> list[dict[str, float]]:
    """Seconds of every side, once a round, beginning with another one each time."""
    found, wanted = [], None
    for i in range(count):
        row: dict[str, float] = {}
        for side in (*SIDES[i % len(SIDES) :], *SIDES[: i % len(SIDES)]):
            row[side] = run(side, work, plans, warm)
            written = hashes(work / "dst")
            wanted = wanted or written
            if written != wanted:
                raise SystemExit(f"{side} wrote other bytes than the local engine")
            shutil.rmtree(work / "dst")
        said = ", ".join(f"{side} {row[side]:.2f} s" for side in SIDES)
        print(f"round {i + 1}: {said}", flush=True)
        found.append(row)
    return found


def summary(rows: list[dict[str, float]], size: int) -> dict[str, Any]:
    one, two = SIDES[2:]
    return {
        "bytes": size,
        "seconds": {side: statistics.median(row[side] for row in rows) for side in SIDES},
        "two_over_one": statistics.median(row[one] / row[two] for row in rows),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':20}{'seconds':>10}{'GB/s':>8}"]
    for side, seconds in result["seconds"].items():
        lines.append(f"{side:20}{seconds:10.2f}{result['bytes'] / seconds / 1e9:8.2f}")
    return "\n".join([*lines, f"two workers against one: {result['two_over_one']:.2f}x"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="leave the source in the page cache")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two workers need two cores")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    layers = layers_for(options.gigabytes)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="cluster-") as name:
        work = Path(name)
        make_checkpoint(work / "src", layers, SHARD_BYTES)
        make_checkpoint(work / "small", 1, 10 * SHARD_BYTES)
        size = sum(file.stat().st_size for file in (work / "src").iterdir())
        shards = len([*(work / "src").glob("*.safetensors")])
        print(f"{size / 1e9:.2f} GB in {shards} shards, {layers} layers", flush=True)
        plans = {"src": llama_plan(layers), "small": llama_plan(1)}
        fold_checkpoint(work / "small", work / "warm", plan=plans["small"])
        shutil.rmtree(work / "warm")
        rows = rounds(work, plans, options.rounds, options.warm)
    result = summary(rows, size)
    print(table(result))
    cache = "warm" if options.warm else "source dropped before each run"
    here = machine()
    record = {"machine": here, "page_cache": cache, "rounds": rows, "result": result}
    slug = re.sub(r"[^a-z0-9]+", "-", here["cpu"].lower()).strip("-")
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"cluster-{slug}-{date.today()}.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(file)


if __name__ == "__main__":
    main()
