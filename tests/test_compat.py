"""Every private name of torch and of transformers is there, and does what flashnorm relies on."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flashnorm
from flashnorm.compat import (
    ATTRIBUTES,
    Private,
    gguf_names,
    quantizer_names,
    torch_names,
    transformers_names,
)
from tests.compat import caches, gguf, models, modules, tensors, watchers  # noqa: F401  (checks)
from tests.compat.checks import CHECKS
from tests.private_names import private_names

PACKAGE = Path(flashnorm.__file__).parent
FILES = (torch_names, transformers_names, gguf_names, quantizer_names)
ROWS = (*ATTRIBUTES, *(row for names in FILES for row in names.NAMES))
HERE = {"torch": torch.__version__, "transformers": transformers.__version__}


def users(row: Private) -> list[str]:
    """The files that use what stands for the name, or the name itself where nothing does."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if not file.is_relative_to(PACKAGE / "compat") and _uses(ast.parse(file.read_text()), row):
            found.append(str(file.relative_to(PACKAGE.parent)))
    return found


def _uses(tree: ast.AST, row: Private) -> bool:
    nodes = list(ast.walk(tree))
    if row.ours:
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        ours = [node for node in imports if f"{node.module}.".startswith("flashnorm.compat.")]
        return any(alias.name == row.ours for node in ours for alias in node.names)
    # An attribute, a method that is overridden, or a string that names either.
    said = {
        getattr(node, key, None)
        for node in nodes
        for key in ("attr", "name", "value")
        if isinstance(getattr(node, key, None), str)
    }
    return row.theirs.rpartition(".")[2] in said


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.theirs)
def test_private_name_does_what_we_rely_on(row):
    try:
        CHECKS[row.theirs]()
    except Exception as error:
        library = row.theirs.partition(".")[0]
        raise AssertionError(
            f"{row.theirs} of {library} {HERE[library]} is not what it was in "
            f"{', '.join(row.seen)} ({row.use}): {type(error).__name__}: {error}. "
            f"It is used as {row.ours or 'it is'} by {', '.join(users(row)) or 'nobody yet'}"
        ) from error


def test_every_row_has_a_check_and_every_check_a_row():
    assert sorted(CHECKS) == sorted({row.theirs for row in ROWS})


def test_a_failure_says_the_version_and_the_user(monkeypatch):
    row = next(row for row in ROWS if row.ours == "builder")
    monkeypatch.setitem(CHECKS, row.theirs, lambda: transformers.gone)
    said = rf"_from_config of transformers {transformers.__version__} is not what .*graph/build\.py"
    with pytest.raises(AssertionError, match=said):
        test_private_name_does_what_we_rely_on(row)


def resolve(theirs: str) -> Any:
    """The object of a name such as `torch.nn.Module._parameters`."""
    parts = theirs.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(theirs)


LATE = {
    "default_device",
    "hooks_of_all",
    "dynamo",
    "export_flag",
    "aot_compiler",
    "inductor_config",
    "graph_passes",
    "graph_compiler",
}


@pytest.mark.parametrize("row", torch_names.NAMES, ids=lambda row: row.theirs)
def test_names_of_torch_are_the_very_objects(row):
    """A wrapper would take its time before every kernel; but for what is looked up late."""
    if row.ours not in LATE:
        assert getattr(torch_names, row.ours) is resolve(row.theirs)


@pytest.mark.parametrize("names", FILES, ids=["torch", "transformers", "gguf", "quantizer"])
def test_compat_uses_the_names_of_its_rows_and_no_others(names):
    found = set(private_names(Path(names.__file__).read_text("utf-8")))
    rows = {row.theirs for row in names.NAMES} - {"torch.nn.modules.module._global_"}
    known = {name for name in found if not name.startswith(".")}
    attributes = {name.rpartition(".")[2] for name in found - known}
    assert {row for row in rows if row in known or row.rpartition(".")[2] in attributes} == rows
    assert known <= rows
    assert attributes <= {row.rpartition(".")[2] for row in rows}


def test_every_name_of_ours_is_defined_once():
    for names in FILES:
        assert all(hasattr(names, row.ours) for row in names.NAMES)
    assert len({row.theirs for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.theirs)
def test_every_row_is_used(row):
    assert users(row)
