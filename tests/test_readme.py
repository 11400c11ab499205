"""The README is a promise: every command and every Python block in it is run as it stands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app

from .test_cli import llama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
WEIGHTS = "adapter_model.safetensors"
ADAPTER = "my-adapter"
MODEL = "demo-output/SmolLM2-135M-Instruct"  # what `make demo` leaves behind

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
MAKE = [line for line in SHELL if line.startswith("make ")]
COMMANDS = [line for line in SHELL if not line.startswith("make ")]


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


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of the README, with this Python's own scripts first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        shlex.split(line),
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def write_adapter(path: Path, base: Path) -> None:
    """A LoRA of rank 2 on the first layer of a Llama."""
    target = "model.layers.0.self_attn.q_proj"
    with safe_open(base / "model.safetensors", "pt") as file:
        k, n = file.get_slice(f"{target}.weight").get_shape()
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{target}"
    factors = {"lora_A": torch.randn(2, n), "lora_B": torch.randn(k, 2)}
    save_file({f"{key}.{a}.weight": v for a, v in factors.items()}, path / WEIGHTS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder in which a tiny Llama stands where the demo leaves its model, and one as GGUF."""
    pytest.importorskip("gguf")
    from .gguf.files import model_file

    folder = tmp_path_factory.mktemp("readme")
    (folder / MODEL).parent.mkdir()
    llama(folder / MODEL, tied=True)
    write_adapter(folder / ADAPTER, folder / MODEL)
    model_file(folder, "llama").rename(folder / "model.gguf")
    return folder


def test_only_what_is_run_here_stands_in_the_readme():
    assert {kind for kind, _ in BLOCKS} == {"", "sh", "python"}
    assert {line.split()[0] for line in SHELL} == {"make", "flashnorm"}
    assert len(PYTHON) == 6
    assert {"make demo", "make test"} <= set(MAKE)
    assert {line.split()[1] for line in COMMANDS} >= {
        "inspect",
        "fold",
        "fold-adapter",
        "verify",
        "bench",
        "--version",
    }


def test_commands(small, monkeypatch):
    """In their order: what one writes the next one reads."""
    monkeypatch.chdir(small)
    for line in COMMANDS:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said = done.stderr.splitlines()
        assert all(word.startswith("warning: ") == ("--strict" in line) for word in said), line
        assert not said or "--strict" in line or line.startswith("flashnorm bench"), line
        if "--json" in line:
            json.loads(done.stdout)
    assert (small / "folded" / "model.safetensors").is_file()
    assert (small / f"{ADAPTER}-folded" / WEIGHTS).is_file()


def test_the_console_script_is_on_the_path(tmp_path):
    assert "flashnorm --version" in COMMANDS
    assert run("flashnorm --version", tmp_path).stdout == f"flashnorm {flashnorm.__version__}\n"


def test_python(small, monkeypatch, capsys):
    monkeypatch.chdir(small)
    for text in PYTHON:
        exec(compile(text, "README.md", "exec"), {})
    lines = ["4 of 5 norms folded, proved: True", "0 LayerNorms left"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.slow
def test_the_demo_and_the_commands_on_its_model(tmp_path):
    pytest.importorskip("gguf")
    for line in ("flashnorm demo", *COMMANDS):
        done = run(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if line == "flashnorm demo":
            write_adapter(tmp_path / ADAPTER, tmp_path / MODEL)


@pytest.mark.parametrize("line", [*MAKE, "make venv"])
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
    table = README.partition("| with | one word |")[2].partition("\n\n")[0].splitlines()[2:]
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
    for place in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / place).exists(), place
