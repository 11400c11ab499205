"""What the documentation shows is run as it stands, on models that are made on the spot."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashnorm
from flashnorm.kernels import dispatch, norms

from .pages import (
    ADAPTER,
    COMMANDS,
    MODEL,
    PYTHON,
    TUTORIALS,
    WEIGHTS,
    blocks,
    commands,
    furnish,
    run_command,
    run_python,
    takes_long,
    write_adapter,
)

PRINTED = {
    "README.md": "1 of 1 gains folded",
    "docs/start.md": "4 of 5 norms folded, proved: True",
    "docs/fold.md": "0 LayerNorms left",
}
LONG = [page for page in (*PYTHON, *TUTORIALS) if any(takes_long(text) for _, text in blocks(page))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what pages expect to find; whatever they register is gone afterwards."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(furnish(tmp_path))
    monkeypatch.setenv("FLASHNORM_CPU_CACHE", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(norms, "KINDS", dict(norms.KINDS))
    monkeypatch.setattr(dispatch, "_backends", list(dispatch._backends))
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("page", [*PYTHON, *TUTORIALS])
def test_python(page, folder, capsys):
    if "torchao" in (text := "".join(text for _, text in blocks(page))):
        pytest.importorskip("torchao")
    assert "flashnorm" in text
    run_python(page)
    assert PRINTED.get(page, "") in capsys.readouterr().out


@pytest.mark.parametrize("page", COMMANDS)
def test_commands(page, folder):
    """In their order: what one writes the next one reads."""
    assert commands(page)
    for line in commands(page):
        run_command(line)
    assert (folder / "folded" / "model.safetensors").is_file()
    assert (folder / f"{ADAPTER}-folded" / WEIGHTS).is_file() == (page == "docs/adapters.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG)
def test_what_takes_long(page, folder):
    run_python(page, slow=True)
    for line in commands(page, slow=True) if page in TUTORIALS else []:
        run_command(line)


def test_the_commands_of_the_first_steps():
    """Every command that a newcomer meets is shown there."""
    shown = {line.split()[1] for page in COMMANDS for line in commands(page)}
    assert shown >= {"inspect", "fold", "fold-adapter", "verify", "bench", "--version"}


def test_the_console_script_is_on_the_path(tmp_path):
    assert "flashnorm --version" in commands("docs/start.md")
    assert run("flashnorm --version", tmp_path).stdout == f"flashnorm {flashnorm.__version__}\n"


@pytest.mark.slow
def test_the_demo_and_the_commands_on_its_model(tmp_path):
    pytest.importorskip("gguf")
    after = [line for page in COMMANDS for line in commands(page)]
    for line in dict.fromkeys(("flashnorm demo", *after)):
        done = run(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if line == "flashnorm demo":
            write_adapter(tmp_path / ADAPTER, tmp_path / MODEL)


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of a page, with this Python's own scripts first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        shlex.split(line),
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
