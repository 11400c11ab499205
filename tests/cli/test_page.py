"""docs/cli.md against the code: every command, exit code and environment variable."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app, boundary, examples
from flashnorm.doctor import settings

COMMANDS = typer.main.get_command(app).commands
PACKAGE = Path(flashnorm.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "cli.md").read_text("utf-8")
SOURCES = [file for pattern in ("*.py", "*.cpp") for file in PACKAGE.rglob(pattern)] + [
    PACKAGE.parent / "setup.py"
]
# A variable is a whole text of Python, or what C++ asks the environment for.
_NAME = re.compile(r"\"(FLASHNORM_[A-Z_]+)\"|getenv\(\"(\w+)\"")


def names_in(text: str) -> set[str]:
    return {one or other for one, other in _NAME.findall(text)}


def rows(heading: str) -> set[str]:
    """The code words that begin the rows of the tables under a heading."""
    part = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `?([\w-]+)`?", part, re.MULTILINE))


def test_every_variable_that_the_code_names_is_described():
    found = set().union(*(names_in(file.read_text("utf-8")) for file in SOURCES))
    assert {"FLASHNORM_CPU_ISA", "FLASHNORM_RUN"} <= found, "the search finds them"
    described = {*settings.VARIABLES, *settings.BUILD}
    assert found - {settings.PREFIX} == described


def test_the_page_has_every_variable():
    named = {name for name in rows("Environment variables") if name.startswith("FLASHNORM_")}
    assert named == {*settings.VARIABLES, *settings.BUILD}
    for name in settings.OTHERS:
        assert f"`{name}`" in PAGE


def test_the_page_has_every_command():
    head = PAGE.partition("\nOptions of all of them")[0]
    assert set(re.findall(r"^\| `([\w-]+)", head, re.MULTILINE)) == set(COMMANDS)


def test_the_page_has_every_exit_code():
    codes = {"0", "1", *map(str, (boundary.ERROR, boundary.INTERRUPTED, boundary.PIPE_CLOSED))}
    assert rows("Exit codes") - {"code"} == codes


@pytest.mark.parametrize("line", [line for lines in examples.LINES.values() for line in lines])
def test_the_examples_are_of_commands_and_options_that_there_are(line):
    words = shlex.split(line)
    command = COMMANDS[words[0]]
    context = command.make_context(words[0], words[1:])  # raises for what it does not know
    assert context.params


def test_every_command_but_the_demo_has_examples():
    assert {*examples.LINES, "demo"} == set(COMMANDS)
    lines = CliRunner().invoke(app, ["fold", "--help"]).stdout.splitlines()
    assert " flashnorm fold ./model ./folded --untie" in [line.rstrip() for line in lines]
