"""Speedups by rows of x, and milliseconds per token, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu import models, operations
from benchmarks.gpu.store import Store
from benchmarks.gpu.tables import machine
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
    figure.supxlabel(machine(store), fontsize=6, wrap=True)
    figure.savefig(file, dpi=120)
    return None


def _speedups(axes: Any, store: Store) -> None:
    rows = [
        row for row in store.rows(operations.STAGE) if row.get("speedup") and row["dtype"] == "bf16"
    ]
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
    """A bar for each variant, from the last row that it is in; what is on the device in front."""
    found: dict[str, tuple[float, float]] = {}
    for row in store.rows(models.DECODE):
        for name, each in row["milliseconds"].items():
            alone = row["device_milliseconds"].get(name, 0.0)
            found[f"{row['model']}\n{name}"] = (each["median"], alone)
    places = range(len(found))
    wall, device = ([values[i] for values in found.values()] for i in (0, 1))
    bars = axes.barh(places, wall, label="by the clock")
    axes.barh(places, device, 0.4, label="on the device")
    axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_yticks(places, list(found), fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("ms per token, lower is better")
    if found:
        axes.legend(fontsize=7)
