"""`python -m tests.zoo.coverage`: fold every type and variant of the zoo, and write the page.

Writes docs/coverage.md and docs/coverage.json: per type the norms, what was folded and kept, the
float64 error, and how many of the refusals were shown to be needed by folding against them.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import flashnorm

from .build import causal_lm_types, variants
from .fold import fold_outcome, needed_refusals
from .overrides import UNBUILDABLE

DOCS = Path(__file__).parents[2] / "docs"
EXACT = 1e-11


@dataclass
class Row:
    """One type or variant. `error` and `noise` as in `Outcome`; `cause` where there is none."""

    name: str
    traced: bool = False
    default_inputs: bool = False
    sites: int = 0
    folded: int = 0
    kept: int = 0
    none: int = 0
    error: float | None = None
    noise: float | None = None
    refused_gains: int = 0
    refusals_needed: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    cause: str = ""

    @property
    def wrong(self) -> bool:
        return self.error is not None and self.error > EXACT


def measure(name: str) -> Row:
    """Fold one type on its default inputs and on its own; the worse of the two counts."""
    row = Row(name)
    if name in UNBUILDABLE:
        row.cause = f"cannot be built by transformers itself: {UNBUILDABLE[name]}"
        return row
    for with_inputs in (False, True):
        try:
            outcome = fold_outcome(name, with_inputs=with_inputs)
        except flashnorm.TraceError as error:
            row.cause = str(error)
            continue
        row.traced = True
        row.default_inputs |= not with_inputs
        row.error = max(row.error or 0.0, outcome.error)
        row.noise = outcome.noise
        states = Counter(site.gain for site in outcome.plan.sites)
        row.sites = len(outcome.plan.sites)
        row.folded, row.kept, row.none = (states[s] for s in ("folded", "kept", "none"))
        row.reasons = {s.path: s.reason for s in outcome.plan.sites if s.gain == "kept"}
    needed = needed_refusals(name) if row.traced and row.kept else {}
    row.refused_gains, row.refusals_needed = len(needed), sum(needed.values())
    return row


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = []
    for name in names or [*causal_lm_types(), *variants()]:
        rows.append(measure(name))
        print(_line(rows[-1]), flush=True)
    print(summary(rows), f"{time.perf_counter() - started:.0f} s")
    if not names:
        write(rows)
    return int(any(row.wrong for row in rows))


def write(rows: list[Row]) -> None:
    DOCS.mkdir(exist_ok=True)
    data = json.dumps([asdict(row) for row in rows], indent=1)
    (DOCS / "coverage.json").write_text(data + "\n")
    (DOCS / "coverage.md").write_text(page(rows))


def summary(rows: list[Row]) -> str:
    types = [row for row in rows if row.name in set(causal_lm_types())]
    traced = [row for row in types if row.traced]
    exact = [row for row in traced if not row.wrong]
    return (
        f"{len(types)} causal-LM types: {len(traced)} traced, {len(exact)} exact, "
        f"{len(traced) - len(exact)} wrong; {sum(r.sites for r in rows)} norms in "
        f"{len(rows)} models: {sum(r.folded for r in rows)} folded, {sum(r.kept for r in rows)} "
        f"kept, {sum(r.none for r in rows)} without a gain; largest float64 error "
        f"{max((r.error or 0.0) for r in rows):.1e}; of {sum(r.refused_gains for r in rows)} "
        f"refused gains, {sum(r.refusals_needed for r in rows)} change the output when folded "
        "all the same."
    )


def page(rows: list[Row]) -> str:
    import transformers

    lines = [
        "# Coverage",
        "",
        f"Made by `python -m tests.zoo.coverage` with transformers {transformers.__version__} and "
        f"torch {torch.__version__.split('+')[0]}: every causal-LM type as a tiny model with "
        "random gains and biases, folded in memory, float64 with all casts kept in float64. "
        "*error* is max |Δlogit| / max |logit| against the original, *noise* the same after "
        "every weight moved by one part in 2⁵². *needed* counts the refused gains that change the "
        "output when they are folded all the same.",
        "",
        summary(rows),
        "",
        "| type | norms | folded | kept | no gain | error | noise | needed | kept because |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_table_row, rows),
        "",
    ]
    return "\n".join(lines)


def _table_row(row: Row) -> str:
    if row.error is None:
        return f"| {row.name} | | | | | | | | {row.cause} |"
    reasons = Counter(map(_short, row.reasons.values()))
    why = "; ".join(f"{count}× {reason}" for reason, count in reasons.items())
    why += "" if row.default_inputs else " (traced on its own inputs only)"
    return (
        f"| {row.name} | {row.sites} | {row.folded} | {row.kept} | {row.none} | {row.error:.1e} | "
        f"{row.noise:.1e} | {row.refusals_needed}/{row.refused_gains} | {why} |"
    )


def _short(reason: str) -> str:
    """The reason without the names of parameters, modules and files; the JSON has it whole."""
    reason = re.sub(r" in '[^']*' at [\w.]+:\d+", "", re.sub(r" \([^()]* at .*$", "", reason))
    return re.sub(r"\b\w+(\.\w+)+\b", "…", reason)


def _line(row: Row) -> str:
    if row.error is None:
        return f"{row.name:28s} not traced: {row.cause[:120]}"
    flag = "  WRONG" if row.wrong else ""
    return (
        f"{row.name:28s} sites {row.sites:3d} folded {row.folded:3d} kept {row.kept:3d} none "
        f"{row.none:3d} error {row.error:.1e} noise {row.noise:.1e} needed {row.refusals_needed}/"
        f"{row.refused_gains}{flag}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
