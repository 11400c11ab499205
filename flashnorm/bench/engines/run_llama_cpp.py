"""llama.cpp as an engine, through llama-cpp-python, in an environment of its own.

Decoding calls llama_decode for one token at a time and takes the largest logit with numpy.
"""

from __future__ import annotations

import time
from typing import Any

import llama_cpp
import numpy as np


class Engine:
    def __init__(self, model: str, threads: int, context: int) -> None:
        self.model = llama_cpp.Llama(
            model,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=context,  # one call for any prompt; n_ubatch stays 512, its own choice
            verbose=False,
        )
        self.vocabulary = self.model.n_vocab()
        self.held: list[int] = []  # the prompt at the beginning of the cache

    def about(self) -> dict[str, Any]:
        system = llama_cpp.llama_print_system_info().decode().strip()
        return {"engine": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", "note": system}

    def _last(self) -> Any:
        """The logits of the last token, which the next call overwrites."""
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocabulary,))

    def _best(self) -> int:
        return int(self._last().argmax())

    def logits(self, prompt: list[int], tokens: list[int], to: str) -> None:
        self._start(prompt)
        rows = [self._last().copy()]
        for token in tokens[:-1]:
            self.model.eval([token])
            rows.append(self._last().copy())
        np.save(to, np.stack(rows))

    def decode(self, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        self._start(prompt)
        written = [self._best()]
        start = time.perf_counter()
        for _ in range(tokens - 1):
            self.model.eval(written[-1:])
            written.append(self._best())
        return (time.perf_counter() - start) / (tokens - 1), written

    def _start(self, prompt: list[int]) -> None:
        """The same prompt again is not read again but for its last token: it may be a long one."""
        if prompt == self.held:
            self.model.n_tokens = len(prompt) - 1
            self.model.eval(prompt[-1:])
            return
        self.model.reset()
        self.model.eval(prompt)
        self.held = prompt

    def prefill(self, ids: list[int]) -> float:
        self.held = []
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(ids)
        self._best()
        return time.perf_counter() - start


def make(asked: dict[str, Any]) -> Engine:
    """`dtype` is that of the file."""
    return Engine(asked["model"], asked["threads"], asked["room"])
