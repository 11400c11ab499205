"""A result as a picture: decoding as bars, prefill as speedups over eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashnorm.bench.machine import line
from flashnorm.bench.records import EAGER, FORWARD, GENERATE, PREFILL, Measured, Result
from flashnorm.bench.tables import label

MISSING = "there is no plot: it needs matplotlib, pip install 'flashnorm[bench]'"


def plot(result: Result, file: Path) -> str | None:
    """Write `file`, whose ending says the format; returns why there is none, or None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return MISSING
    figure = Figure(figsize=(11, 4 * len(result.measured) + 0.6), layout="constrained")
    axes = figure.subplots(len(result.measured), 2, squeeze=False)
    for (left, right), found in zip(axes, result.measured, strict=True):
        _decode(left, found)
        _prefill(right, found)
    figure.suptitle(label(result))
    figure.supxlabel(line(result.machine), fontsize=6)
    figure.savefig(file, dpi=120)
    return None


def _decode(axes: Any, found: Measured) -> None:
    """ms per token after the first context, a group of bars for each way; the limit is a line."""
    kinds = (GENERATE, FORWARD)
    decoded = [row for row in found.rows if row.kind in kinds]
    first = next((row.context for row in decoded), None)
    decoded = [row for row in decoded if row.context == first]
    names = list(dict.fromkeys(row.variant for row in decoded))
    width = 0.8 / max(1, len(names))
    for at, name in enumerate(names):
        rows = [row for row in decoded if row.variant == name]
        places = [kinds.index(row.kind) + (at - (len(names) - 1) / 2) * width for row in rows]
        bars = axes.bar(places, [row.timing.median * 1e3 for row in rows], width, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    if found.bandwidth is not None:
        limit = found.token_bytes / found.bandwidth.memory / 1e6
        axes.axhline(limit, color="gray", linestyle=":", label="weights read once")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("ms per token, lower is better")
    axes.set_title(f"{found.dtype}, decoding")
    axes.legend(fontsize=7)


def _prefill(axes: Any, found: Measured) -> None:
    """Speedup over eager against the number of tokens, below one where we lose."""
    rows = [row for row in found.rows if row.kind == PREFILL and row.variant != EAGER]
    for name in dict.fromkeys(row.variant for row in rows):
        points = [(row.tokens, row.speedup) for row in rows if row.variant == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    counts = sorted({row.tokens for row in rows})
    axes.set_xticks(counts, list(map(str, counts)), fontsize=7)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("speedup over eager, higher is better")
    axes.set_title(f"{found.dtype}, prefill")
    if rows:
        axes.legend(fontsize=7)
