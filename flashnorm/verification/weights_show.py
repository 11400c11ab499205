"""A comparison of weights as a table, for a terminal and for plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from flashnorm.verification.show import check_lines
from flashnorm.verification.weights_report import problem

if TYPE_CHECKING:
    from flashnorm.verification.weights_report import WeightsReport

ROWS = 20


def panel(report: WeightsReport) -> RenderableType:
    """Everything that a person wants to read of a report, top to bottom."""
    parts: list[RenderableType] = [_heading(report)]
    parts += _tensors(report)
    parts += _rest("tensors", report.wrong_count, len(report.wrong[:ROWS]))
    parts += [Text(f"{one.file}: {one.problem}", style="red") for one in report.files[:ROWS]]
    parts += _rest("differences of files", report.files_count, len(report.files[:ROWS]))
    parts.append(_verdict(report))
    parts += [Text(f"note: {note}", style="dim") for note in report.notes]
    return Group(*parts)


def _heading(report: WeightsReport) -> Text:
    text = Text(f"{report.reference}  against  {report.candidate}\n", style="bold")
    what = "a copy" if report.mode == "copy" else f"{report.folded} norms folded, {report.mode}"
    text.append(
        f"{what}: {report.compared} tensors, {report.nbytes / 1e6:,.1f} MB, bit for bit in "
        f"{report.seconds:.1f} s; no model was run",
        style="not bold dim",
    )
    return text


def _tensors(report: WeightsReport) -> list[RenderableType]:
    """Two lines for each: which tensor, and how it differs."""
    found: list[RenderableType] = []
    for one in report.wrong[:ROWS]:
        name = Text(one.tensor, style="red", no_wrap=True, overflow="ignore")
        found += [name.append(f" in {one.file}", style="dim"), Text(f"    {problem(one)}")]
    return found


def _rest(things: str, count: int, shown: int) -> list[RenderableType]:
    return [Text(f"and {count - shown} more {things}", style="red")] if count > shown else []


def _verdict(report: WeightsReport) -> Text:
    text = check_lines(report.checks)
    made = "a copy of the reference" if report.mode == "copy" else "what the fold of it makes"
    if report.ok:
        text.append(f"The candidate is, bit for bit, {made}.", style="bold green")
        return text
    text.append(f"The candidate is NOT {made}.\n", style="bold red")
    text.append(
        "It may compute the same nevertheless: flashnorm verify without --quick measures that."
    )
    return text
