"""A result for a terminal, as Markdown, and in files."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from flashnorm.bench.further import further
from flashnorm.bench.records import Result
from flashnorm.bench.tables import Table, failures, heading, label, tables


def begin(result: Result) -> RenderableType:
    """What stands above the first group of figures."""
    return Group(*(Text(text) for text in heading(result)))


def end(result: Result) -> RenderableType:
    """What stands below the last one: what was not measured, and what was not asked for."""
    parts = [group(failures(found)) for found in result.measured if found.failures]
    return Group(*parts, Text(further(result.settings)))


def group(table: Table) -> RenderableType:
    """One table for a terminal."""
    view = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(table.header):
        view.add_column(name, justify="right" if at else "left", overflow="fold")
    for row in table.rows:
        view.add_row(*map(Text, row))
    return Group(view, Text(table.note, style="dim")) if table.note else view


def markdown(result: Result) -> str:
    """The same as Markdown."""
    lines = [f"# {label(result)}", ""]
    for text in heading(result):
        lines += [text, ""]
    for found in result.measured:
        lines += [f"## {found.dtype}", ""]
        for table in tables(found):
            lines += markdown_table(table)
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(table: Table) -> list[str]:
    """The lines of one table."""
    rule = ("---", *("---:" for _ in table.header[1:]))
    rows = [_line(table.header), _line(rule), *map(_line, table.rows)]
    note = [table.note, ""] if table.note else []
    return [f"**{table.title}**", "", *rows, "", *note]


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def write_text(result: Result, prefix: Path) -> None:
    """Write PREFIX.json and PREFIX.md, each at once: an interrupt leaves whole files."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for ending, text in (
        ("json", json.dumps(result.to_json(), indent=1) + "\n"),
        ("md", markdown(result)),
    ):
        part = prefix.with_name(f"{prefix.name}.{ending}.part")
        part.write_text(text, "utf-8")
        part.replace(prefix.with_name(f"{prefix.name}.{ending}"))


def write(result: Result, prefix: Path) -> tuple[list[Path], str | None]:
    """Write PREFIX.json, PREFIX.md and PREFIX.png; what was written, and why there is no plot."""
    from flashnorm.bench.plot import plot

    files = [prefix.with_name(f"{prefix.name}.{ending}") for ending in ("json", "md", "png")]
    write_text(result, prefix)
    missing = plot(result, files[2])
    return files[: 2 if missing else 3], missing
