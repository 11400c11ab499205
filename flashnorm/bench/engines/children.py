"""Engines as processes that wait until they are asked, so that no two of them run at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flashnorm
from flashnorm.errors import FlashNormError

HERE = Path(__file__).parent
SETTLE = 0.05  # seconds in which the threads of the engine before stop spinning
FOUND_SECONDS = 60


@dataclass(frozen=True)
class Kind:
    """An engine: the file beside this one, what its Python has to have, and how it gets that.

    `only` is the dtype that its files have to be in, where it does not read all.
    """

    script: str
    module: str
    install: str
    only: str | None = None


KINDS = {
    "llama.cpp": Kind("run_llama_cpp", "llama_cpp", "pip install llama-cpp-python"),
    "openvino": Kind("run_openvino", "openvino_genai", "pip install openvino-genai", "fp16"),
}


@dataclass(frozen=True)
class Chosen:
    """An engine and the Python that has it."""

    name: str
    python: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


def choose(text: str) -> Chosen:
    """`name` in this environment, or `name=python` in another one.

    Raises FlashNormError where there is no such engine, or where that Python has it not.
    """
    name, _, python = text.partition("=")
    if name not in KINDS:
        raise FlashNormError(f"no engine {name!r}: choose from {', '.join(KINDS)}")
    # Not resolved: the link of a virtual environment is what makes it one.
    chosen = Chosen(name, str(Path(python).expanduser().absolute()) if python else sys.executable)
    _find(chosen)
    return chosen


def _find(chosen: Chosen) -> None:
    kind, python = chosen.kind, chosen.python
    # Looked for and not imported: that may take seconds.
    code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({kind.module!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, timeout=FOUND_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FlashNormError(f"{chosen.name}: {python} does not run: {error}") from error
    if done.returncode:
        raise FlashNormError(
            f"{chosen.name}: {python} has no {kind.module}: {kind.install}, or name the Python "
            f"that has it: --engines {chosen.name}=PYTHON"
        )


def model_file(chosen: Chosen, source: str, gguf: str | None, dtype: str) -> str:
    """The file that an engine reads: `gguf`, in which {dtype} stands for the dtype, or `source`.

    Raises FlashNormError where there is none.
    """
    given = gguf or (source if source.endswith(".gguf") else None)
    if given is None:
        raise FlashNormError(
            f"{chosen.name} reads GGUF files, and {source} is none: name one with --gguf "
            "(llama.cpp's convert_hf_to_gguf.py writes it from the model's directory)"
        )
    path = Path(given.replace("{dtype}", chosen.kind.only or dtype)).expanduser().absolute()
    if not path.is_file():
        raise FlashNormError(f"{chosen.name}: there is no file {path}: see --gguf")
    return str(path)


def command(
    python: str, script: str, model: str, dtype: str, threads: int, room: int, **more: object
) -> list[str]:
    """How a process of an engine is started, with room for `room` tokens in its cache."""
    asked = {"model": model, "dtype": dtype, "threads": threads, "room": room, **more}
    return [python, str(HERE / "serve.py"), script, json.dumps(asked)]


def our_command(variant: str, model: str, dtype: str, threads: int, **how: object) -> list[str]:
    """One of our own variants as an engine; it imports the flashnorm that runs here."""
    path = [str(Path(flashnorm.__file__).parents[1])]
    more = {"variant": variant, "path": path, **how}
    return command(sys.executable, "run_flashnorm", model, dtype, threads, 0, **more)


class Child:
    """An engine in a process of its own, which waits while others are measured."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """The answer. Raises RuntimeError where the engine failed or is gone."""
        time.sleep(SETTLE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.name} ended: {said[-1] if said else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it by closing its stdin."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
