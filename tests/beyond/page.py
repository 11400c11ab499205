"""The section "Beyond transformers" of docs/coverage.md."""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from tests.zoo.page import BEYOND, _first, _short, with_beyond

from .rows import EXACT, Row, counted

DOCS = Path(__file__).parents[2] / "docs"
HEAD = (
    "| class | model | norms | folded | kept | none | error | modules accelerated | f32 ours "
    "| f32 theirs | kept or refused because |"
)
PACKAGES = {"open-clip": "open_clip_torch", "lucidrains": "", "torch-geometric": "torch_geometric"}


def write(rows: list[Row]) -> None:
    """docs/beyond.json, and the section in the place of the one that docs/coverage.md has."""
    data = json.dumps([asdict(row) for row in rows], indent=1)
    (DOCS / "beyond.json").write_text(data + "\n")
    page = DOCS / "coverage.md"
    page.write_text(with_beyond(page.read_text(), "\n" + section(rows)))


def section(rows: list[Row]) -> str:
    lines = [
        BEYOND,
        "",
        f"Made by `make field-env` (`python -m tests.beyond`) with torch "
        f"{torch.__version__.split('+')[0]} on Python {platform.python_version()}: tiny models of "
        "other libraries, with random gains and biases. *error* is the float64 error of the folded "
        "model, max |Δ| / max |·| of all outputs with all casts kept in float64. *f32 ours* and "
        "*f32 theirs* are the float32 errors of the accelerated and of the untouched model against "
        "the same float64 truth; a row is wrong where the two differ by more than the bound that "
        "roundings explain, or where the original does not come back bit for bit.",
        "",
        total(rows),
        "",
        *_libraries(rows),
    ]
    for library in dict.fromkeys(row.library for row in rows):
        own = [row for row in rows if row.library == library]
        lines += ["", f"### {library}{_version(library)}", "", HEAD]
        lines += ["|---" * (HEAD.count("|") - 1) + "|", *map(_table_row, own)]
    return "\n".join([*lines, ""])


def total(rows: list[Row]) -> str:
    states = Counter(row.state for row in rows)
    gains = counted(rows, "gains")
    largest = max((r.error for r in rows if r.error is not None and r.state == "exact"), default=0)
    return (
        f"{len(rows)} model classes of {len({r.library for r in rows})} libraries: "
        f"{states['exact']} exact (float64, at most {EXACT:.0e}; largest {largest:.1e}), "
        f"{states['noise']} moved further by rounding alone, {states['wrong']} wrong, "
        f"{states['no norm']} without a norm, {states['error']} not done, for the causes below; "
        f"{sum(r.sites for r in rows)} norms: {gains['folded']} gains folded, {gains['kept']} "
        f"kept, {gains['none']} norms without; {sum(r.fused for r in rows)} of "
        f"{sum(r.parts for r in rows)} modules accelerated."
    )


def _libraries(rows: list[Row]) -> list[str]:
    lines = [
        "| library | classes | exact | noise | wrong | no norm | error | norms | folded | kept |",
        "|---" * 10 + "|",
    ]
    for library in dict.fromkeys(row.library for row in rows):
        own = [row for row in rows if row.library == library]
        states, gains = Counter(row.state for row in own), counted(own, "gains")
        counts = [states[state] for state in ("exact", "noise", "wrong", "no norm", "error")]
        cells = [len(own), *counts, sum(r.sites for r in own), gains["folded"], gains["kept"]]
        lines.append(f"| {library} | " + " | ".join(map(str, cells)) + " |")
    return lines


def _version(library: str) -> str:
    package = PACKAGES.get(library, library)
    try:
        return f" {metadata.version(package)}" if package else ""
    except metadata.PackageNotFoundError:
        return ""


def _table_row(row: Row) -> str:
    name = row.key.partition(":")[2]
    norms = ", ".join(f"{count} {kind}" for kind, count in sorted(row.norms.items()))
    gains = [row.gains.get(state, 0) for state in ("folded", "kept", "none")]
    cells = [name, row.model, norms, *gains, _number(row.error), f"{row.fused}/{row.parts}"]
    cells += [_number(row.ours), _number(row.theirs), _why(row)]
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _why(row: Row) -> str:
    reasons = Counter(map(_short, row.reasons.values()))
    why = "; ".join(f"{count}× {reason}" for reason, count in reasons.items())
    flag = f"**{row.state}** " if row.state in ("wrong", "noise") else ""
    cause = f"{row.category}: {_first(row.cause)}" if row.category else why
    return flag + cause


def line(row: Row) -> str:
    """One line of progress."""
    text = f"{row.key:44s} {row.seconds:5.1f} s {row.state:8s} norms {row.sites:3d} {row.gains}"
    numbers = [row.error, row.apart, row.bound, row.ours, row.theirs, row.shaken]
    text += " error {} apart {} bound {} ours {} theirs {} shaken {}".format(*map(_number, numbers))
    text += f" fused {row.fused}/{row.parts}"
    if row.touched:
        text += f" TOUCHED {row.touched[0][:100]}"
    return text + (f" {row.category}: {_first(row.cause)[:160]}" if row.category else "")
