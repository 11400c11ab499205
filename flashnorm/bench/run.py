"""`bench`: check every variant of a model, then time them in turn, then weigh them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.bench import machine
from flashnorm.bench.beside import Beside
from flashnorm.bench.check import Truth, check, find_truth, why_far, why_wrong
from flashnorm.bench.measure import decode, prefill
from flashnorm.bench.memory import in_child, peak_allocated
from flashnorm.bench.models import (
    DTYPES,
    is_config,
    open_model,
    parameter_bytes,
    token_bytes,
    token_ids,
)
from flashnorm.bench.records import (
    CHECKS,
    DECODE,
    EAGER,
    MEMORY,
    OURS,
    PREFILL,
    VARIANTS,
    Bandwidth,
    Check,
    Engine,
    Failure,
    Measured,
    Memory,
    Result,
    Row,
    Settings,
)
from flashnorm.bench.tables import Table, groups
from flashnorm.bench.timing import in_words
from flashnorm.bench.variants import Variant, build, many_compilations
from flashnorm.errors import FlashNormError
from flashnorm.verification.inputs import longest

Progress = Callable[[str], None]
Done = Callable[[Result, Table], None]

FAR = 8  # decoded tokens that are compared after a longer prompt
PREFILL_MEMORY = 2048  # tokens of the pass whose memory is measured


def bench(
    settings: Settings,
    progress: Progress = lambda step: None,
    done: Done = lambda result, group: None,
) -> Result:
    """Measure what `settings` ask for. A variant that raises is reported, the others go on.

    `done` is given every group of figures as soon as there is one, and all that there is by then.
    Raises FlashNormError where the settings make no sense or the model cannot be loaded.
    """
    _refuse(settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    measured: list[Measured] = []
    where, notes = machine.describe(), _notes(settings)

    def so_far(found: Measured, group: Table) -> None:
        done(Result(settings, where, (*measured, found), notes, complete=False), group)

    try:
        with torch.no_grad():
            for dtype in settings.dtypes:
                measured.append(_measure(settings, dtype, progress, so_far))
        return Result(settings, where, tuple(measured), notes)
    finally:
        torch.set_num_threads(threads)


def _measure(
    settings: Settings, dtype: str, progress: Progress, done: Callable[[Measured, Table], None]
) -> Measured:
    beside = Beside(settings, dtype)
    try:
        with many_compilations():
            return _Bench(settings, dtype, beside, progress, done).run()
    finally:
        beside.close()


def _refuse(settings: Settings) -> None:
    if unknown := [name for name in settings.dtypes if name not in DTYPES]:
        raise FlashNormError(f"no dtype {unknown[0]!r}: choose from {', '.join(DTYPES)}")
    if unknown := [name for name in settings.variants if name not in VARIANTS]:
        raise FlashNormError(f"no variant {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    if EAGER not in settings.variants:
        raise FlashNormError("the variants lack eager, which the others are held against")
    counts = (settings.threads, settings.rounds, *settings.contexts, *settings.prefill)
    if min(counts) < 1 or settings.tokens < 2:
        raise FlashNormError(
            "threads, rounds, context and prefill have to be 1 or more, tokens 2 or more"
        )


def _notes(settings: Settings) -> tuple[str, ...]:
    random = f"{settings.source} is a config alone: its weights are random"
    return (random,) if is_config(settings.source) else ()


class _Bench:
    """The variants of one model in one dtype, and what became of them."""

    def __init__(
        self,
        settings: Settings,
        dtype: str,
        beside: Beside,
        progress: Progress,
        done: Callable[[Measured, Table], None],
    ) -> None:
        self.settings, self.dtype, self.tell, self.at = settings, dtype, progress, 0
        self.beside, self.done = beside, done
        self.checks: list[Check] = []
        self.engines: list[Engine] = []
        self.rows: list[Row] = []
        self.memory: list[Memory] = []
        self.bandwidth: Bandwidth | None = None
        self.failures: list[Failure] = []
        self.progress("loading")
        self.model: nn.Module = open_model(settings.source, dtype, settings.packed)
        room = longest(self.model)
        if max(settings.contexts) + settings.tokens > room:
            raise FlashNormError(
                f"context and tokens are {max(settings.contexts) + settings.tokens} together, and "
                f"the model takes {room}: ask for fewer"
            )
        self.lengths = [count for count in settings.prefill if count <= room]
        self.weighed = min(PREFILL_MEMORY, room)
        longest_run = max([*settings.contexts, self.weighed, *self.lengths])
        self.ids = token_ids(settings.source, self.model, longest_run)
        for count in settings.prefill:
            if count > room:
                self._fail(EAGER, f"prefill of {count}", f"the model takes {room} tokens")

    def progress(self, step: str) -> None:
        """Say which step begins, and which of how many it is at most."""
        self.at += 1
        settings = self.settings
        count = 1 + len(settings.variants) + len(settings.contexts) + len(settings.prefill)
        count += len(settings.variants) if settings.memory else 0
        self.step = f"{self.dtype}: step {self.at} of {count}: {step}"
        self.tell(self.step)

    def within(self, how_far: str) -> None:
        """Say how far the step is."""
        self.tell(f"{self.step} | {how_far}")

    def run(self) -> Measured:
        self._check_all()
        for context in self.settings.contexts:
            self._decode(context)
        for count in self.lengths:
            self._prefill(count)
        if self.settings.memory:
            self._weigh()
        return self.found()

    def found(self) -> Measured:
        """All that there is until now."""
        return Measured(
            dtype=self.dtype,
            parameter_bytes=parameter_bytes(self.model),
            token_bytes=token_bytes(self.model),
            checks=tuple(self.checks),
            rows=tuple(self.rows),
            memory=tuple(self.memory),
            bandwidth=self.bandwidth,
            failures=(*self.failures, *self.beside.failures),
            engines=tuple(self.engines),
        )

    def _show(self, kind: str, place: int = 0) -> None:
        found = self.found()
        for table in groups(found, kind, place):
            self.done(found, table)

    def _fail(self, name: str, step: str, error: Exception | str) -> None:
        words = error if isinstance(error, str) else in_words(error)
        self.failures.append(Failure(name, step, words))

    def _check_all(self) -> None:
        """Build every variant and hold it against eager; those that stand are in `variants`."""
        prompt = self.ids[: self.settings.contexts[0]]
        eager = build(EAGER, self.model)
        self.progress("eager in float64")
        truth = find_truth(eager, self.model, prompt, self.settings.tokens)
        base = check(eager, truth)
        self.variants, self.checks = [eager], [base]
        for name in self.settings.variants:
            if name != EAGER and (found := self._check(name, truth)):
                variant, result = found
                self.checks.append(result)
                if (why := why_wrong(result, base)) is None:
                    self.variants.append(variant)
                else:
                    self._fail(name, "check", why)
        self.engines = self.beside.meet(truth)
        self._show(CHECKS)

    def _check(self, name: str, truth: Truth) -> tuple[Variant, Check] | None:
        self.progress(f"checking {name}")
        tokens = max(self.settings.contexts) + self.settings.tokens
        try:
            variant = build(name, self.model, tokens=tokens)
            return variant, check(variant, truth)
        except Exception as error:
            self._fail(name, "check", error)
            return None

    def _decode(self, context: int) -> None:
        settings, prompt = self.settings, self.ids[:context]
        self.progress(f"decoding after {context}")
        rows, failures, bandwidth = decode(
            self._standing(prompt),
            prompt,
            settings.tokens,
            settings.rounds,
            token_bytes(self.model),
            settings.cache,
            self.within,
            self.beside.decode(prompt),
        )
        self.rows += rows
        self.failures += failures
        self.bandwidth = self.bandwidth or bandwidth
        self._show(DECODE, context)

    def _standing(self, prompt: Tensor) -> list[Variant]:
        """The variants that are near eager after `prompt`; after the first one all are."""
        if len(prompt) == self.settings.contexts[0]:
            return self.variants
        eager, *others = self.variants
        self.within("reading the prompt")
        expected = eager.forced(prompt, prompt.new_zeros(FAR))
        standing = [eager]
        for variant in others:
            try:
                why = why_far(variant, expected, prompt, self.checks[0])
            except Exception as error:
                why = in_words(error)
            if why is None:
                standing.append(variant)
            else:
                self._fail(variant.name, f"check after {len(prompt)}", why)
        return standing

    def _prefill(self, count: int) -> None:
        self.progress(f"prefill of {count}")
        ids, others = self.ids[:count], self.beside.prefill(self.ids, count)
        found, failures = prefill(self.variants, ids, self.settings.rounds, self.within, others)
        self.rows += found
        self.failures += failures
        self._show(PREFILL, count)

    def _weigh(self) -> None:
        """Memory of every variant that stood, in this process and in one of its own."""
        ids = self.ids[: self.weighed]
        for variant in self.variants:
            self.progress(f"memory of {variant.name}")
            row: dict[str, Any] = {}
            try:
                variant.prefill(ids)  # what is made once is made now
                row["activations"] = peak_allocated(partial(variant.prefill, ids))
                if variant.name in (EAGER, OURS):
                    row |= in_child(self._request(variant.name))
            except Exception as error:
                self._fail(variant.name, "memory", error)
            self.memory.append(Memory(variant.name, self.weighed, **row))
        self._show(MEMORY)

    def _request(self, name: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "source": settings.source,
            "dtype": self.dtype,
            "packed": settings.packed,
            "variant": name,
            "threads": settings.threads,
            "context": settings.contexts[0],
            "tokens": settings.tokens,
            "prefill": self.weighed,
        }
