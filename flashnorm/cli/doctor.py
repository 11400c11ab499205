"""The command `doctor`: what was found on this machine, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from flashnorm.cli import examples
from flashnorm.cli.boundary import Options, Result, run
from flashnorm.cli.options import AsJson, Quiet, Traceback

if TYPE_CHECKING:
    from flashnorm.doctor import Row

MARKS = {"ok": ("✓", "green"), "missing": ("–", "dim"), "note": ("!", "yellow")}
BROKEN = ("✗", "bold red")
ONE_LINE = 90  # characters: what was found and its mend
VERDICTS = {
    "ok": "everything that flashnorm needs works here",
    "broken": "something that flashnorm needs does not work here: see the rows marked ✗",
}


def register(app: typer.Typer) -> None:
    """Give an app the command."""
    app.command("doctor", epilog=examples.of("doctor"))(doctor_command)


def doctor_command(as_json: AsJson = False, quiet: Quiet = False, debug: Traceback = False) -> None:
    """Look at this machine: processor, kernels, cards, versions; what is missing, how to get it.

    Writes nothing. Exit code 1 where something that flashnorm needs does not work.
    """
    run(run_doctor, Options(as_json, debug, quiet, foreign=True))  # works without transformers


def run_doctor() -> Result:
    """Look at everything; exit code 1 where something that the package needs does not work."""
    from flashnorm.cli.progress import waiting
    from flashnorm.doctor import examine

    with waiting("looking"):
        rows = list(examine())
    broken = any(row.state == "broken" for row in rows)
    data = {"ok": not broken, "rows": [asdict(row) for row in rows]}
    return Result(data, _view(rows, broken), int(broken))


def _view(rows: Sequence[Row], broken: bool) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for group in dict.fromkeys(row.group for row in rows):
        table = Table(title=group, title_justify="left", box=None, show_header=False)
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in (row for row in rows if row.group == group):
            mark, style = MARKS.get(row.state, BROKEN)
            found = Text(row.found)
            if row.mend:
                gap = "\n" if len(row.found) + len(row.mend) > ONE_LINE else "  "
                found.append(f"{gap}→ {row.mend}", style="bold" if row.state == "broken" else "")
            table.add_row(Text(mark, style=style), Text(row.name), found)
        parts.append(table)
    verdict = "broken" if broken else "ok"
    style = BROKEN[1] if broken else "green"
    return Group(*parts, Text(f"\n{VERDICTS[verdict]}", style=style))
