"""The reference of the command line, from the commands themselves: arguments and options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HELD = ("", None, False)  # defaults that say nothing


def reference() -> str:
    """A section in Markdown for each command that is not hidden, in the order of `--help`."""
    from typer.main import get_command

    from flashnorm.cli import app

    group: Any = get_command(app)
    shown = [command for command in group.commands.values() if not command.hidden]
    return "\n".join(line for command in shown for line in section(command))


def section(command: Any) -> Iterator[str]:
    takes = [one for one in command.params if not getattr(one, "hidden", False)]
    given = " ".join(named(one) for one in takes if not is_option(one))
    name = f"flashnorm {command.name}"
    yield from (f"## {name}", "", f"    {name} [OPTIONS] {given}", "", command.help or "", "")
    yield from ("| | what it is | if left |", "|---|---|---|")
    yield from (row(one) for one in takes)
    yield ""


def row(parameter: Any) -> str:
    left = "" if parameter.default in HELD else f"`{parameter.default}`"
    left = "required" if parameter.required else left
    also = f" Also the environment variable `{parameter.envvar}`." if parameter.envvar else ""
    return f"| `{named(parameter)}` | {parameter.help}{also} | {left} |".replace("\n", " ")


def named(parameter: Any) -> str:
    """`--out PREFIX`, `--memory / --no-memory`, `MODEL`, `[FOLDED]`."""
    if not is_option(parameter):
        return parameter.metavar if parameter.required else f"[{parameter.metavar}]"
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or parameter.name.upper()}"


def is_option(parameter: Any) -> bool:
    return parameter.opts[0].startswith("-")
