"""A result for a terminal, as Markdown, and in files."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from flashnorm.bench.records import Result
from flashnorm.bench.tables import Table, heading, label, tables


def show(result: Result) -> RenderableType:
    """Everything, top to bottom, for a terminal."""
    parts: list[RenderableType] = [Text(text) for text in heading(result)]
    for found in result.measured:
        parts.append(Text(f"\n{found.dtype}", style="bold"))
        parts += [_rich(table) for table in tables(found)]
    return Group(*parts)


def _rich(table: Table) -> RenderableType:
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


def write(result: Result, prefix: Path) -> tuple[list[Path], str | None]:
    """Write PREFIX.json, PREFIX.md and PREFIX.png; what was written, and why there is no plot."""
    from flashnorm.bench.plot import plot

    prefix.parent.mkdir(parents=True, exist_ok=True)
    files = [prefix.with_name(f"{prefix.name}.{ending}") for ending in ("json", "md", "png")]
    files[0].write_text(json.dumps(result.to_json(), indent=1) + "\n", "utf-8")
    files[1].write_text(markdown(result), "utf-8")
    missing = plot(result, files[2])
    return files[: 2 if missing else 3], missing
