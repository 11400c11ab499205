"""Speedups by rows of x, and milliseconds per token, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu import models, operations
from benchmarks.gpu.store import Store
from benchmarks.gpu.tables import VARIANTS, machine
from flashnorm.bench.plot import MISSING


def plot(store: Store, file: Path) -> str | None:
    """Write `file`; returns why there is none, or None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return MISSING
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _speedups(left, store)
    _decode(right, store)
    figure.supxlabel(machine(store.runs[-1]), fontsize=6, wrap=True)
    figure.savefig(file, dpi=120)
    return None


def _speedups(axes: Any, store: Store) -> None:
    rows = [row for row in store.rows(operations.STAGE) if row.get("speedup")]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        points = [(row["rows"], row["speedup"]) for row in rows if row["shape"] == shape]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=shape)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows of x")
    axes.set_ylabel("speedup over the best other side")
    if rows:
        axes.legend(fontsize=7)


def _decode(axes: Any, store: Store) -> None:
    rows = store.rows(models.DECODE)
    width = 0.8 / len(VARIANTS)
    for at, name in enumerate(VARIANTS):
        found = [
            (i + (at - 1.5) * width, row["milliseconds"][name]["median"])
            for i, row in enumerate(rows)
            if name in row["milliseconds"]
        ]
        if found:
            bars = axes.bar(*zip(*found, strict=True), width, label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(rows)), [row["model"] for row in rows])
    axes.set_ylabel("ms per token, lower is better")
    if rows:
        axes.legend(fontsize=7)
