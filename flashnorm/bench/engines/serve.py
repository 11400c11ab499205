"""An engine answers one question at a time: a line of JSON in, a line of JSON out.

    python serve.py run_llama_cpp '{"model": ..., "threads": 2, "room": 128, "dtype": "bf16"}'

Nothing but the standard library, and run by its path, because the Python that has the engine may
have no flashnorm. The engine is what `make(asked)` of the file beside this one returns.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol


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

    def logits(self, prompt: list[int], tokens: list[int], to: str) -> None:
        """Write the logits before each of `tokens`, decoded one by one: [S, V] float32, as .npy."""
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
    if asked["do"] == "logits":
        engine.logits(asked["prompt"], asked["tokens"], asked["to"])
        return {}
    return {"seconds": engine.prefill(asked["ids"])}


if __name__ == "__main__":
    here = Path(__file__).parent
    if sys.path[0] == str(here):  # its files are no modules of anybody
        sys.path.pop(0)
    name, asked = sys.argv[1], json.loads(sys.argv[2])
    sys.path[:0] = asked.pop("path", [])
    spec = importlib.util.spec_from_file_location(name, here / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    serve(engine.make(asked))
