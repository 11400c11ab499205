"""What runs without the packages of extras, and what says which extra it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashnorm import extras
from flashnorm.errors import FlashNormError
from tests.kernels import cases
from tests.packaging import absent

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSTALL = 'pip install "flashnorm[hf]"'
MODEL = "a model that is named, not given as a torch.nn.Module, needs transformers"
CALLS = {
    "flashnorm.inspect('somewhere')": MODEL,
    "flashnorm.verify('one', 'other')": MODEL,
    "flashnorm.load_gguf('model.gguf')": MODEL,
    "flashnorm.fold_checkpoint('one', 'other')": "fold_checkpoint needs transformers and filelock",
    "flashnorm.fold_adapter('one', None, 'b')": "fold_adapter needs transformers and filelock",
    "flashnorm.FlashNormConfig()": "flashnorm.FlashNormConfig needs transformers",
    "flashnorm.AutoFlashNormForCausalLM": "flashnorm.FlashNormConfig needs transformers",
}
EACH = """
import flashnorm
for call in {calls!r}:
    try:
        eval(call)
    except flashnorm.FlashNormError as error:
        print(error)
"""


def run(program: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program where nothing that extras bring can be imported."""
    command = [sys.executable, "-m", "tests.packaging.absent", ",".join(absent.EXTRAS)]
    return subprocess.run(
        [*command, str(program), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_plain_module_needs_no_extra():
    done = run(HERE / "plain_module.py", *(["kernels"] if cases.ISAS else []))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "fine"


def test_what_needs_an_extra_says_which(tmp_path):
    program = tmp_path / "calls.py"
    program.write_text(EACH.format(calls=list(CALLS)), "utf-8")
    done = run(program)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(CALLS), done.stdout
    for line, begins in zip(said, CALLS.values(), strict=True):
        assert line.startswith(f"{begins}, but transformers is not installed"), line
        assert line.endswith(f": {INSTALL}")


def test_the_command_says_what_to_install():
    done = run(ROOT / "flashnorm/__main__.py", "inspect", "somewhere", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: the command line needs rich and typer, but rich is not installed, "
        f"typer is not installed: {INSTALL}"
    ]


def test_an_old_package_is_told_from_a_new_one(monkeypatch):
    monkeypatch.setattr(extras, "version", lambda name: "5.15.2")
    message = r"this needs transformers, but transformers is 5\.15, older than 5\.16: pip install"
    with pytest.raises(FlashNormError, match=message):
        extras.need("this", "transformers")
    for fine in ("5.16.0.dev0", "5.16.0", "6.0.0"):
        monkeypatch.setattr(extras, "version", lambda name, found=fine: found)
        extras.need("this", "transformers")


def test_what_is_on_the_path_without_a_version_is_taken(monkeypatch):
    def unknown(name: str) -> str:
        raise extras.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "version", unknown)
    extras.need("this", "transformers", "rich")
