"""The engines that run beside the variants of one model: started, asked in turn, ended."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flashnorm.bench.check import Truth, margin
from flashnorm.bench.engines.children import Child, choose, command, model_file
from flashnorm.bench.records import Engine, Failure, Settings
from flashnorm.verification.measure import first_difference

ROOM = 64  # tokens of a cache beyond those that are asked for


class Beside:
    """The processes of one dtype. One that fails is left out from then on, and told of."""

    def __init__(self, settings: Settings, dtype: str) -> None:
        self.settings, self.failures = settings, list[Failure]()
        self.children: list[Child] = []
        self.files: dict[str, str] = {}
        self.asked = 0
        self._logs = tempfile.TemporaryDirectory()
        longest = max([*(each + settings.tokens for each in settings.contexts), *settings.prefill])
        for text in settings.engines:
            chosen = choose(text)
            file = model_file(chosen, settings.source, settings.gguf, dtype)
            line = command(
                chosen.python, chosen.kind.script, file, dtype, settings.threads, longest + ROOM
            )
            self.files[chosen.name] = file
            self.children.append(Child(chosen.name, line, Path(self._logs.name, chosen.name)))

    def close(self) -> None:
        for child in self.children:
            child.close()
        self._logs.cleanup()

    def meet(self, truth: Truth) -> list[Engine]:
        """What the engines are, and how far their text is eager's."""
        found = []
        for child in list(self.children):
            try:
                about = child.ask("about")
                said = child.ask("decode", prompt=truth.prompt.tolist(), tokens=len(truth.written))
                found.append(self._engine(child.name, about, said["tokens"], truth))
            except Exception as error:
                self.failures.append(Failure(child.name, "start", str(error)))
                self.children.remove(child)
                child.close()
        return found

    def _engine(self, name: str, about: dict[str, Any], tokens: list[int], truth: Truth) -> Engine:
        first = first_difference(truth.written, truth.written.new_tensor(tokens))
        return Engine(
            name=name,
            engine=about["engine"],
            note=about["note"],
            file=self.files[name],
            equal=len(truth.written) if first is None else first,
            tokens=len(truth.written),
            margin=margin(truth.logits[first]) if first in range(len(truth.logits)) else None,
        )

    def decode(self, prompt: Tensor) -> dict[str, Callable[[], float]]:
        """Seconds per token after `prompt` [T], of every engine."""
        return {each.name: partial(self._decode, each, prompt.tolist()) for each in self.children}

    def _decode(self, child: Child, prompt: list[int]) -> float:
        return float(child.ask("decode", prompt=prompt, tokens=self.settings.tokens)["seconds"])

    def prefill(self, ids: Tensor, count: int) -> dict[str, Callable[[], float]]:
        """Seconds of a pass over `count` of `ids` [T], of every engine."""
        return {
            each.name: partial(self._prefill, each, ids.tolist(), count) for each in self.children
        }

    def _prefill(self, child: Child, ids: list[int], count: int) -> float:
        """Another text each time: some engines keep the cache of a beginning that they know."""
        self.asked += 1
        start = self.asked % len(ids)
        return float(child.ask("prefill", ids=(ids[start:] + ids)[:count])["seconds"])
