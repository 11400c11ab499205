"""How an engine is asked for one measurement at a time: a line of JSON in, a line of JSON out.

Nothing but the standard library, because every engine runs this in an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[2]
SETTLE = 0.05  # seconds in which the threads of the engine before stop spinning


class Engine(Protocol):
    """What an engine can be asked. Times are in seconds."""

    def about(self) -> dict[str, Any]: ...

    def decode(self, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        """Seconds per token after the first, and the greedy tokens."""
        ...

    def prefill(self, ids: list[int]) -> float:
        """Seconds from the ids to the logits after them."""
        ...

    def margins(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """How far the two largest logits are apart before each of `tokens`. Ours only."""
        ...


def serve(engine: Engine) -> None:
    """Answer until stdin ends. What the engine itself prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(engine, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(engine: Engine, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["do"] == "about":
        return engine.about()
    if asked["do"] == "decode":
        seconds, tokens = engine.decode(asked["prompt"], asked["tokens"])
        return {"seconds": seconds, "tokens": tokens}
    if asked["do"] == "margins":
        return {"margins": engine.margins(asked["prompt"], asked["tokens"])}
    return {"seconds": engine.prefill(asked["ids"])}


class Child:
    """An engine in a process of its own, which waits while others are measured."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
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
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
