"""`python -m tests.beyond [--out FILE] [--again] [library or key ...]`: measure the zoo.

Appends a line of JSON per class to FILE (build/beyond.jsonl), so that a run that was cut off goes
on where it was; with `--again` those that are named are measured anew. Then writes
docs/beyond.json, and the section of docs/coverage.md that is made of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .measure import work
from .page import line, total, write
from .registry import specimens
from .rows import Row

PROCESSES = 1
LIMIT = 400.0  # seconds for one class


def main(arguments: list[str]) -> int:
    from tests.zoo.parallel import spread

    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("build/beyond.jsonl"))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--page", action="store_true", help="write docs from what is there")
    given = parser.parse_args(arguments)
    rows = recorded(given.out)
    chosen = [s for s in specimens(given.names) if given.again or s.key not in rows]
    started = time.perf_counter()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a") as out:
        keys = [s.key for s in chosen] if not given.page else []
        for done, (key, row, cause) in enumerate(spread(work, keys, given.processes, LIMIT), 1):
            failed = Row(key, key.partition(":")[0], category="does not end or dies", cause=cause)
            rows[key] = row or failed
            print(json.dumps(asdict(rows[key])), file=out, flush=True)
            print(f"{done:4d}/{len(keys)} {line(rows[key])}", flush=True)
    known = [s.key for s in specimens(given.names)]
    found = sorted((r for r in rows.values() if r.key in known), key=lambda r: known.index(r.key))
    print(total(found), f"{time.perf_counter() - started:.0f} s")
    if given.page or not given.names:
        write(found)
    return int(any(row.state == "wrong" for row in found))


def recorded(file: Path) -> dict[str, Row]:
    """The last row of every key."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = (Row(**json.loads(text)) for text in lines)
    return {row.key: row for row in rows}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
