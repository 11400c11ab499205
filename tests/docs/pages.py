"""The pages whose blocks are run as they stand, and what their blocks are."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from flashnorm.cli import app
from tests.test_cli import llama

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODEL = "demo-output/SmolLM2-135M-Instruct"  # what `make demo` leaves behind
ADAPTER = "my-adapter"
WEIGHTS = "adapter_model.safetensors"

TUTORIALS = sorted(f"docs/tutorials/{page.name}" for page in (DOCS / "tutorials").glob("*.md"))
# Pages opt in: all their blocks in Python are run, and all their commands.
PYTHON = ("README.md", "docs/start.md", "docs/fold.md", "docs/quantized.md", "docs/engines.md")
COMMANDS = ("docs/start.md", "docs/adapters.md")
# What takes a minute by itself: what is compiled, and measuring the machine.
SLOW = ("package=", ".compile()", "flashnorm tune")
TALKS = ("flashnorm bench", "flashnorm tune")  # they show on stderr how far they are


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every block of a page, in order."""
    text = (ROOT / page).read_text("utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell(page: str) -> list[str]:
    return [line for kind, text in blocks(page) if kind == "sh" for line in text.splitlines()]


def commands(page: str, slow: bool = False) -> list[str]:
    """The commands of ours on a page."""
    found = [line for line in shell(page) if line.startswith("flashnorm ")]
    return [line for line in found if slow or not takes_long(line)]


def takes_long(text: str) -> bool:
    return any(word in text for word in SLOW)


def run_python(page: str, slow: bool = False) -> dict[str, Any]:
    """Run the blocks of a page one after the other; returns the names that they leave."""
    names: dict[str, Any] = {}
    for number, text in enumerate(text for kind, text in blocks(page) if kind == "python"):
        if slow or not takes_long(text):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries, about tiny models
                exec(compile(text, f"{page}, block {number}", "exec"), names)
    return names


def run_command(line: str) -> None:
    """A line of a page: it ends well, says nothing beside its result, and JSON where asked to."""
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    said = done.stderr.splitlines()
    assert all(word.startswith("warning: ") == ("--strict" in line) for word in said), line
    assert not said or "--strict" in line or line.startswith(TALKS), line
    if "--json" in line:
        json.loads(done.stdout)


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


def furnish(folder: Path) -> Path:
    """A folder with a tiny Llama where the demo leaves its model, an adapter, and a GGUF file."""
    from tests.gguf.files import model_file

    (folder / MODEL).parent.mkdir()
    llama(folder / MODEL, tied=True)
    write_adapter(folder / ADAPTER, folder / MODEL)
    model_file(folder, "llama").rename(folder / "model.gguf")
    return folder
