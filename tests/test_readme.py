"""The README is a promise: every command and every Python block in it is run as it stands.

Its blocks in Python are run in tests/docs/test_pages.py, with those of the pages it leads to.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest

from tests.docs.pages import PYTHON, ROOT, blocks, shell

TEXT = (ROOT / "README.md").read_text("utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
SHELL = [*shell("README.md"), *shell("docs/start.md")]
MAKE = sorted(
    {*re.findall(r"`(make [\w-]+)`", TEXT), *(line for line in SHELL if line.startswith("make "))}
)
SCREEN = 80  # lines: it is read in a minute


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text("utf-8")
    return {name for line in re.findall(r"^\.PHONY: (.*)$", text, re.M) for name in line.split()}


def rule(target: str) -> str:
    """The recipe of a target, as make itself would run it. `make -n` does run recursive makes."""
    assert "$(MAKE)" not in (ROOT / "Makefile").read_text("utf-8")
    done = subprocess.run(
        ["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_one_screen_and_holds_only_what_is_run():
    assert len(TEXT.splitlines()) <= SCREEN
    assert "README.md" in PYTHON
    assert {kind for kind, _ in blocks("README.md")} == {"", "sh", "python"}
    assert {line.split()[0] for line in shell("README.md")} == {"pip"}
    assert {line.split()[0] for line in shell("docs/start.md") if line} == {"make", "flashnorm"}
    assert {"make demo", "make docs", "make test", "make venv"} == set(MAKE)


@pytest.mark.parametrize("line", shell("README.md"))
def test_what_is_installed_is_this_package_and_an_extra_of_it(line):
    verb, what = line.split()[:2], shlex.split(line)[2]
    name, _, extras = what.rstrip("]").partition("[")
    assert verb == ["pip", "install"]
    assert f'\nname = "{name}"\n' in PROJECT
    known = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert all(f"\n{extra} = [" in known for extra in extras.split(",") if extra)


@pytest.mark.parametrize("line", MAKE)
def test_make_commands_are_targets(line):
    (target,) = shlex.split(line)[1:]
    assert target in targets()
    assert rule(target)


def test_make_demo_runs_the_demo_and_make_test_everything():
    assert ".venv/bin/flashnorm demo" in rule("demo")
    recipe = rule("test")
    assert '-m "not slow"' in recipe
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert f".venv/bin/{tool}" in recipe
    assert "not slow" not in rule("test-all")


def test_the_check_of_a_change_is_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    last = script.read_text("utf-8").splitlines()[-1]
    assert last == "exec make test"
    assert last.removeprefix("exec ") in MAKE


# By its words in the table of engines: the test that does this, and what stands there.
ENGINES = {
    "quantization_config=": ("test_auto.py", "quantization_config="),
    "AutoFlashNormForCausalLM": ("test_auto.py", "AutoFlashNormForCausalLM.from_pretrained("),
    "transformers serve": ("serving.py", '"serve"'),
    "vllm.LLM(": ("test_vllm.py", '"load_format": "flashnorm"'),
    "model_loader_extra_config=": ("test_vllm.py", 'extra_config": {"kernels": True}'),
    "FLASHNORM_FOLD": ("test_sglang.py", 'setenv(sglang_plugin.FOLD, "1")'),
    "flashnorm eval": ("test_evaluation.py", '"eval"'),
    "torch.onnx.export(": ("test_export.py", "torch.onnx.export("),
}


def test_each_row_of_the_engines_is_what_a_test_does():
    page = (ROOT / "docs" / "engines.md").read_text("utf-8")
    table = page.partition("| with | one word |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == len(ENGINES)
    for row, (word, (file, text)) in zip(table, ENGINES.items(), strict=True):
        assert word in row
        assert text in (ROOT / "tests" / "engines" / file).read_text("utf-8")


@pytest.mark.parametrize("code", [0, 7])
def test_the_check_ends_as_make_ends(code, tmp_path):
    """`make` on the path is a stand-in that ends with `code`."""
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$@" in "$PWD"\nexit {code}\n')
    make.chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci" / "run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (code, f"test in {ROOT}\n")


def test_links_lead_somewhere():
    """Those of all other pages are checked where the site is built."""
    for place in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (ROOT / place).exists(), place
