"""A report as a table, for a terminal and for plain text."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from flashnorm.verification.report import Check, Pair, Report

WIDTH = 100


def panel(report: Report) -> RenderableType:
    """Everything that a person wants to read of a report, top to bottom."""
    parts: list[RenderableType] = [_heading(report), _figures(report), _verdict(report)]
    if report.layers:
        parts.append(_layers(report))
    parts += [Text(f"note: {note}", style="dim") for note in report.notes]
    return Group(*parts)


def plain(report: Report) -> str:
    """The same without colours, 100 columns wide."""
    return as_text(panel(report))


def as_text(view: RenderableType) -> str:
    """A view as plain text."""
    console = Console(file=StringIO(), width=WIDTH, color_system=None)
    console.print(view)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _heading(report: Report) -> Text:
    text = Text(f"{report.reference}  against  {report.candidate}\n", style="bold")
    text.append(
        f"{report.output} at {report.rows} positions of {report.inputs}, {report.seconds:.0f} s; "
        f"width {report.width}, depth {report.depth}, {report.stored} weights",
        style="not bold dim",
    )
    return text


def _figures(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "reference", "candidate", "difference", "bound"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    exact, bound = report.float64, report.float64_bound
    table.add_row("float64 error, max", "0", "", f"{exact.max:.2e}", f"{bound:.2e}")
    single, bound = report.float32, report.float32_bound
    table.add_row("float32 error, max", "", "", f"{single.max:.2e}", f"{bound:.2e}")
    _pair_rows(table, "float32", report.precise)
    if report.half is not None:
        _pair_rows(table, report.half_dtype, report.half)
    if report.kl is not None:
        table.add_row("KL divergence, float64, nats", "", "", f"{report.kl:.2e}", "")
    if report.perplexity is not None:
        found = report.perplexity
        change = f"{found.candidate / found.reference - 1:+.1e}"
        name = f"perplexity, {found.tokens} tokens by {found.window}"
        table.add_row(name, f"{found.reference:.4f}", f"{found.candidate:.4f}", change, "")
        table.add_row("top-1 agreement", "", "", f"{found.top1:.2%}", "")
    return table


def _pair_rows(table: Table, dtype: str, pair: Pair) -> None:
    for name in ("max", "rms", "typical"):
        values = [f"{getattr(side, name):.2e}" for side in (pair.reference, pair.candidate)]
        ratio = f"× {pair.ratio:.3f}" if name == "typical" else ""
        table.add_row(f"{dtype} to truth, {name}", *values, ratio, "")


def check_lines(checks: Iterable[Check]) -> Text:
    """The parts of a verdict, a line each."""
    text = Text()
    for check in checks:
        text.append("ok   " if check.ok else "FAIL ", style="green" if check.ok else "red")
        text.append(f"{check.name}: {check.detail}\n")
    return text


def _verdict(report: Report) -> Text:
    text = check_lines(report.checks)
    if report.ok:
        text.append("The candidate computes what the reference computes.", style="bold green")
    else:
        text.append("The candidate does NOT compute what the reference does.", style="bold red")
    return text


def _layers(report: Report) -> RenderableType:
    first = report.first_wrong_layer
    if first is None:
        return Text("every compared module keeps within the bound: the error is made after them")
    start = report.layers.index(first)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="modules from the first wrong one on")
    table.add_column("module")
    table.add_column("max|Δ|/max|y|", justify="right")
    for layer in report.layers[max(0, start - 2) : start + 6]:
        style = "red" if layer is first else ""
        table.add_row(layer.path, f"{layer.error:.2e}", style=style)
    return table
