"""`python -m tests.zoo.coverage [name ...]`: fold every model type, and write the page.

Writes docs/coverage.md and docs/coverage.json: per type the norms, what was folded and kept, the
float64 error, how many of the refusals were shown to be needed by folding against them, and for
every type that is not covered the cause. Two processes; a type that hangs or dies is a row too.
With names, those alone are measured again, and put in the place of their rows.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .build import causal_lm_types, variants
from .classes import further_types, whole_models
from .page import beyond, line, page, total, with_beyond
from .parallel import spread
from .rows import EXACT, Row, group_of, work

__all__ = ["EXACT", "main", "recorded"]

DOCS = Path(__file__).parents[2] / "docs"
PROCESSES = 2
LIMIT = 600.0  # seconds for one type
SLOW = 5.0  # seconds of the processor from which on a type is left to the slow tests


def main(names: list[str]) -> int:
    started = time.perf_counter()
    chosen = names or [*causal_lm_types(), *variants(), *whole_models(), *further_types()]
    rows = []
    for name, row, cause in spread(work, chosen, PROCESSES, LIMIT):
        failed = Row(name, group_of(name), category="does not end or fails", cause=cause)
        rows.append(row or failed)
        print(f"{len(rows):4d}/{len(chosen)} {line(rows[-1])}", flush=True)
    rows.sort(key=lambda row: chosen.index(row.name))
    print(total(rows), f"{time.perf_counter() - started:.0f} s")
    write(rows if not names else _merged(rows))
    return int(any(row.wrong for row in rows))


def _merged(rows: list[Row]) -> list[Row]:
    """The rows of the last run, with these in the place of their own."""
    fresh = {row.name: row for row in rows}
    return [fresh.get(row.name, row) for row in recorded()]


def write(rows: list[Row]) -> None:
    DOCS.mkdir(exist_ok=True)
    data = json.dumps([asdict(row) for row in rows], indent=1)
    (DOCS / "coverage.json").write_text(data + "\n")
    file = DOCS / "coverage.md"
    known = beyond(file.read_text()) if file.exists() else ""
    file.write_text(with_beyond(page(rows), known))


def recorded() -> list[Row]:
    """The rows of the last run, from docs/coverage.json."""
    return [Row(**row) for row in json.loads((DOCS / "coverage.json").read_text())]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
