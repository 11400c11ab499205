"""`flashnorm run`: start a program so that the models it loads are accelerated.

The program is started as it is; two variables of its environment make the Pythons in it run
`startup/sitecustomize.py`, which waits for transformers. They write down what became of each model.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashnorm.errors import FlashNormError
from flashnorm.paged import Paged

SETTINGS = "FLASHNORM_RUN"  # sitecustomize.py has it too: it imports nothing
STARTUP = Path(__file__).parent / "startup"
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True)
class Settings:
    """What the Pythons of a program are told: what to do, and the directory for their notes."""

    notes: str
    fold: bool = False
    package: str | None = None

    @classmethod
    def read(cls, text: str) -> Settings:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Ran(Paged, pages="flashnorm.engines.run_page"):
    """How a program ended, and what became of the models that it loaded.

    `accelerations` are those of `models` that were accelerated, module by module.
    """

    command: tuple[str, ...]
    code: int
    models: tuple[dict[str, Any], ...]
    fallbacks: dict[str, int]
    problems: tuple[str, ...] = ()
    accelerations: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What there is to say in a few lines: all but the modules one by one."""
        return {name: value for name, value in asdict(self).items() if name != "accelerations"}

    def __str__(self) -> str:
        lines = [f"flashnorm: {line}" for model in self.models for line in _lines(model)]
        lines += [f"flashnorm: {problem}" for problem in self.problems]
        if not self.models:
            lines.append("flashnorm: no model was loaded by from_pretrained of transformers")
        for reason, count in sorted(self.fallbacks.items(), key=lambda item: -item[1]):
            lines.append(f"flashnorm: {count} calls ran on plain torch: {reason}")
        return "\n".join(lines)


def _lines(model: dict[str, Any]) -> Iterator[str]:
    name = f"{model['model']} ({model['source']})" if model.get("source") else model["model"]
    if model["problem"]:
        yield f"{name} was not accelerated: {model['problem']}"
        return
    folded = ", folded" if model["folded"] else ""
    yield f"{name}: {model['fused']} of {model['modules']} modules on {model['kernels']}{folded}"
    for reason, count in model["reasons"].items():
        yield f"  {count} ran their own code: {reason}"
    if model["attention"]:
        yield f"  attention ran its own code: {model['attention']}"


def run_command(
    command: Sequence[str], *, fold: bool = False, package: str | os.PathLike[str] | None = None
) -> Ran:
    """Run a command to its end, in this terminal, with its models accelerated.

    Signals that this process gets are the command's. Its code is its own, or 128 + the signal that
    ended it. Raises FlashNormError where the command cannot be started.
    """
    program = _find(command[0])
    with tempfile.TemporaryDirectory(prefix="flashnorm-run-") as notes:
        where = None if package is None else os.path.abspath(os.path.expanduser(package))
        environment = _environment(Settings(notes, fold, where))
        with _signals() as children:
            try:
                child = subprocess.Popen([program, *command[1:]], env=environment)
            except OSError as error:
                raise FlashNormError(_unstarted(command[0], error)) from error
            children.append(child)
            code = child.wait()
        return _ran(tuple(command), code if code >= 0 else 128 - code, Path(notes))


def _find(name: str) -> str:
    """Where a command is: on the path, or beside the Python that runs flashnorm."""
    beside = os.path.dirname(sys.executable)
    found = shutil.which(name) or shutil.which(name, path=beside)
    if found is not None:
        return found
    if os.path.isfile(name):
        raise FlashNormError(f"{name} cannot be executed: for a script, run `python {name}`")
    raise FlashNormError(f"the command {name!r} was not found: check its spelling and the PATH")


def _unstarted(name: str, error: OSError) -> str:
    return f"{name} cannot be started ({error.strerror}): for a script, run `python {name}`"


def _environment(settings: Settings) -> dict[str, str]:
    paths = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {SETTINGS: json.dumps(asdict(settings)), "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **told}


@contextmanager
def _signals() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Hand signals on to the children in this list, and live on until they have ended."""
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        if number == signal.SIGINT and _typed():
            return  # the terminal has told the children itself
        for child in children:
            child.send_signal(number)

    before = {}
    for name in FORWARDED:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _typed() -> bool:
    """Whether Ctrl-C in a terminal reaches this process, and with it its children."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False


def _ran(command: tuple[str, ...], code: int, notes: Path) -> Ran:
    """What the Pythons of a program wrote down, in the order in which they began."""
    models: list[dict[str, Any]] = []
    fallbacks: dict[str, int] = {}
    problems: list[str] = []
    for file in sorted(notes.glob("*.json"), key=lambda file: int(file.stem)):
        note = json.loads(file.read_text("utf-8"))
        models += note["models"]
        problems += [note["problem"]] if note["problem"] else []
        for reason, count in note["fallbacks"].items():
            fallbacks[reason] = fallbacks.get(reason, 0) + count
    found = [model.pop("acceleration") for model in models if "acceleration" in model]
    return Ran(
        command, code, tuple(models), fallbacks, tuple(dict.fromkeys(problems)), tuple(found)
    )
