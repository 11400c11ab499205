"""What `flashnorm tune` does with its options."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flashnorm.cli.boundary import Result
from flashnorm.errors import FlashNormError

if TYPE_CHECKING:
    from flashnorm.kernels.cpu.measure import Measured


def run_tune(threads: int | None) -> Result:
    """Measure, store, and show every time that was measured."""
    import torch
    from rich.console import Group
    from rich.text import Text

    from flashnorm.cli.progress import named_steps
    from flashnorm.kernels.cpu import calls, crossovers, measure

    if threads is not None:
        if threads < 1:
            raise FlashNormError(f"--threads takes a count of at least 1, not {threads}")
        torch.set_num_threads(threads)
    with named_steps("measuring") as report:
        found = measure.measure(progress=report)
    file = measure.store(found)
    machine = f"{crossovers.machine()}, {calls.available()[1]}"
    rows = [_row(row) for row in found]
    data: dict[str, Any] = {"machine": machine, "file": file and str(file), "rows": rows}
    last = Text(f"written: {file}" if file else f"{crossovers.CACHE}=off: nothing is kept")
    return Result(data, Group(Text(machine), *(_table(row) for row in found), last))


def _row(row: Measured) -> dict[str, Any]:
    return {"key": row.key, "seconds": row.seconds, **asdict(row.crossover)}


def _table(row: Measured) -> Any:
    """Microseconds by rows and way; what is taken is marked."""
    from rich.table import Table

    chosen = row.crossover
    table = Table(title=row.key, title_justify="left", box=None)
    table.add_column("rows", justify="right")
    for way in row.seconds:
        table.add_column(f"{way}, µs", justify="right")
    for rows in row.seconds["packed"]:
        ours = "packed" if rows >= chosen.packed else "as they come"
        taken = ours if rows <= chosen.library else "library"
        cells = []
        for way, seconds in row.seconds.items():
            mark = " *" if way == taken else ""
            cells.append(f"{seconds[rows] * 1e6:.1f}{mark}" if rows in seconds else "")
        table.add_row(str(rows), *cells)
    return table
