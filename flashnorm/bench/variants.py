"""One model in one of the ways to run it: as loaded, compiled, on our kernels, or both."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.bench.models import accelerated_copy, package_length, sharing_copy
from flashnorm.bench.records import COMPILE, EAGER, OURS, OURS_COMPILED, PACKAGED
from flashnorm.compat.torch_names import dynamo
from flashnorm.compat.transformers_names import compile_everywhere_

LONG = 512  # tokens of a prompt that is read once, and its cache copied for every run
NEVER = 2**31 - 1  # a token that no model writes
LIMIT = 64  # compiled forms of one forward: lengths, caches and variants share it


class Clock:
    """A streamer of `generate` that notes when each token came. The prompt is put first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def per_token(self) -> float:
        """Seconds per token after the first, which the prefill brings."""
        first, last = self.times[1], self.times[-1]
        return (last - first) / (len(self.times) - 2)


class Variant:
    """How to run `model`: prefill, decode in a loop of forwards, decode by `generate`.

    Compiled (`mode` is that of torch.compile), decoding runs on a static cache with a prefill that
    is not compiled, as `generate` does by itself on other devices; prefill alone is the compiled
    forward.
    """

    def __init__(
        self, name: str, model: nn.Module, compiled: bool, mode: str | None = None
    ) -> None:
        self.name, self.compiled = name, compiled
        self.model: Any = model
        self.call: Any = torch.compile(model, mode=mode) if compiled else model
        self._caches: dict[int, Any] = {}  # by their length: another cache is compiled again
        self._read: tuple[Tensor, Any, Tensor] | None = None  # a long prompt, and what `start` gave
        accepted = inspect.signature(model.forward).parameters
        self.keeps_logits = "logits_to_keep" in accepted

    def _kept(self, count: int) -> dict[str, int]:
        return {"logits_to_keep": count} if self.keeps_logits else {}

    def prefill(self, ids: Tensor) -> Tensor:
        """The logits [V] after `ids` [T], in one pass that fills a cache."""
        result = self.call(ids[None], use_cache=True, **self._kept(1)).logits[0, -1]
        assert isinstance(result, Tensor)
        return result

    def logits(self, ids: Tensor, count: int) -> Tensor:
        """The last `count` logits [count, V] of one pass without a cache."""
        result = self.call(ids[None], use_cache=False, **self._kept(count)).logits[0, -count:]
        assert isinstance(result, Tensor)
        return result

    def start(self, prompt: Tensor, room: int) -> tuple[Any, Tensor]:
        """A cache after `prompt` [T], with room for `room` tokens more, and the logits [V]."""
        cache = self._static_cache(len(prompt) + room) if self.compiled else None
        found = self.model(prompt[None], past_key_values=cache, use_cache=True, **self._kept(1))
        return found.past_key_values, found.logits[0, -1]

    def _static_cache(self, length: int) -> Any:
        from transformers import StaticCache

        if length not in self._caches:
            self._caches[length] = StaticCache(config=self.model.config, max_cache_len=length)
        self._caches[length].reset()
        return self._caches[length]

    def begin(self, prompt: Tensor, room: int) -> tuple[Any, Tensor]:
        """The same as `start`. A long prompt is read once, until `forget`."""
        if self.compiled or len(prompt) <= LONG:
            return self.start(prompt, room)
        if self._read is None or not torch.equal(self._read[0], prompt):
            self._read = (prompt, *self.start(prompt, room))
        return copy.deepcopy(self._read[1]), self._read[2]

    def forget(self) -> None:
        """Give back the cache of the prompt that was read."""
        self._read = None

    def step(self, token: Tensor, cache: Any) -> Tensor:
        """The logits [V] after one more `token` []."""
        if self.compiled:  # what a CUDA graph returned before may be overwritten from now on
            torch.compiler.cudagraph_mark_step_begin()
        result = self.call(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1]
        assert isinstance(result, Tensor)
        return result

    def forced(self, prompt: Tensor, forced: Tensor) -> Tensor:
        """The logits [S, V] that come before each of the S tokens `forced`, decoded one by one."""
        cache, last = self.begin(prompt, len(forced))
        rows = [last.clone()]
        for token in forced[:-1]:
            rows.append(self.step(token, cache).clone())
        return torch.stack(rows)

    def loop(self, prompt: Tensor, tokens: int) -> float:
        """Seconds per token of a greedy loop of `tokens` forwards; the prefill is not timed."""
        cache, logits = self.begin(prompt, tokens)
        finish(prompt.device)
        start = time.perf_counter()
        for _ in range(tokens):
            logits = self.step(logits.argmax(), cache)
        finish(prompt.device)
        return (time.perf_counter() - start) / tokens

    def generate(self, prompt: Tensor, tokens: int) -> tuple[float, Tensor]:
        """Seconds per token after the first, and the `tokens` greedy tokens, by `generate`."""
        clock = Clock()
        written = self.model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            eos_token_id=NEVER,  # all write as many; `min_new_tokens` takes time at each
            pad_token_id=0,
            streamer=clock,
            **self._static(),
        )
        return clock.per_token(), written[0, len(prompt) :]

    def _static(self) -> dict[str, Any]:
        """What makes `generate` compile its steps on a CPU as it does elsewhere by itself."""
        if not self.compiled:
            return {}
        from transformers import CompileConfig

        config = CompileConfig(mode="default", fullgraph=False)
        compile_everywhere_(config)
        return {"cache_implementation": "static", "compile_config": config}


def finish(device: torch.device) -> None:
    """Wait until a device that works on its own has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def build(name: str, model: nn.Module, mode: str | None = None, tokens: int = 1) -> Variant:
    """The variant `name` of `model`, which is left as it is; weights are shared.

    A package takes so many `tokens` or more.
    """
    if name == EAGER:
        return Variant(name, model, False)
    if name == COMPILE:
        return Variant(name, sharing_copy(model), True, mode)
    assert name in (OURS, OURS_COMPILED, PACKAGED), name
    ours = accelerated_copy(model, package_length(tokens) if name == PACKAGED else 0)
    return Variant(name, ours, name == OURS_COMPILED, mode)


@contextmanager
def many_compilations() -> Iterator[None]:
    """Room for every length and variant; where it does not do, an error and no silent fallback.

    What was compiled is forgotten at the end, with the models that it holds.
    """
    capturing = dynamo()
    with capturing.config.patch(recompile_limit=LIMIT, fail_on_recompile_limit_hit=True):
        try:
            yield
        finally:
            capturing.reset()
