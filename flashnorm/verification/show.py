"""A report as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flashnorm.verification import plain

if TYPE_CHECKING:
    from flashnorm.verification.report import Check, Report

WIDTH = 100


def panel(report: Report) -> RenderableType:
    """Everything that a person wants to read of a report, top to bottom."""
    parts: list[RenderableType] = [_heading(report), _figures(report), _verdict(report)]
    if report.layers:
        parts.append(_layers(report))
    parts += [Text(f"note: {note}", style="dim") for note in report.notes]
    return Group(*parts)


def as_text(view: RenderableType) -> str:
    """A view as plain text, 100 columns wide."""
    console = Console(file=StringIO(), width=WIDTH, color_system=None)
    console.print(view)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def check_lines(checks: Iterable[Check]) -> Text:
    """The parts of a verdict, a line each."""
    text = Text()
    for check in checks:
        text.append("ok   " if check.ok else "FAIL ", style="green" if check.ok else "red")
        text.append(f"{check.name}: {check.detail}\n")
    return text


def _heading(report: Report) -> Text:
    models, compared = plain.heading(report)
    text = Text(f"{models}\n", style="bold")
    return text.append(compared, style="not bold dim")


def _figures(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in plain.HEADER:
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for row in plain.figures(report):
        table.add_row(*row)
    return table


def _verdict(report: Report) -> Text:
    text = check_lines(report.checks)
    if report.ok:
        text.append(plain.OK, style="bold green")
    else:
        text.append(plain.WRONG, style="bold red")
    return text


def _layers(report: Report) -> RenderableType:
    first = report.first_wrong_layer
    if first is None:
        return Text(plain.AFTERWARDS)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=plain.FIRST)
    table.add_column(plain.LAYERS[0])
    table.add_column(plain.LAYERS[1], justify="right")
    for layer in plain.wrong_layers(report):
        style = "red" if layer is first else ""
        table.add_row(layer.path, f"{layer.error:.2e}", style=style)
    return table
