"""`bench`: check every variant of a model, then time them in turn, then weigh them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.bench import machine
from flashnorm.bench.check import Truth, check, find_truth, why_wrong
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
    EAGER,
    OURS,
    VARIANTS,
    Bandwidth,
    Check,
    Failure,
    Measured,
    Memory,
    Result,
    Row,
    Settings,
)
from flashnorm.bench.timing import in_words
from flashnorm.bench.variants import Variant, build, many_compilations
from flashnorm.errors import FlashNormError
from flashnorm.verification.inputs import longest

Progress = Callable[[str], None]

PREFILL_MEMORY = 2048  # tokens of the pass whose memory is measured


def bench(settings: Settings, progress: Progress = lambda step: None) -> Result:
    """Measure what `settings` ask for. A variant that raises is reported, the others go on.

    Raises FlashNormError where the settings make no sense or the model cannot be loaded.
    """
    _refuse(settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with torch.no_grad():
            measured = [_measure(settings, dtype, progress) for dtype in settings.dtypes]
        return Result(settings, machine.describe(), tuple(measured), _notes(settings))
    finally:
        torch.set_num_threads(threads)


def _measure(settings: Settings, dtype: str, progress: Progress) -> Measured:
    with many_compilations():
        return _Bench(settings, dtype, progress).run()


def _refuse(settings: Settings) -> None:
    if unknown := [name for name in settings.dtypes if name not in DTYPES]:
        raise FlashNormError(f"no dtype {unknown[0]!r}: choose from {', '.join(DTYPES)}")
    if unknown := [name for name in settings.variants if name not in VARIANTS]:
        raise FlashNormError(f"no variant {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    if EAGER not in settings.variants:
        raise FlashNormError("the variants lack eager, which the others are held against")
    counts = (settings.threads, settings.rounds, settings.context, *settings.prefill)
    if min(counts) < 1 or settings.tokens < 2:
        raise FlashNormError(
            "threads, rounds, context and prefill have to be 1 or more, tokens 2 or more"
        )


def _notes(settings: Settings) -> tuple[str, ...]:
    random = f"{settings.source} is a config alone: its weights are random"
    return (random,) if is_config(settings.source) else ()


class _Bench:
    """The variants of one model in one dtype, and what became of them."""

    def __init__(self, settings: Settings, dtype: str, progress: Progress) -> None:
        self.settings, self.dtype, self.tell, self.done = settings, dtype, progress, 0
        self.failures: list[Failure] = []
        self.progress("loading")
        self.model: nn.Module = open_model(settings.source, dtype)
        room = longest(self.model)
        if settings.context + settings.tokens > room:
            raise FlashNormError(
                f"context and tokens are {settings.context + settings.tokens} together, and the "
                f"model takes {room}: ask for fewer"
            )
        self.lengths = [count for count in settings.prefill if count <= room]
        self.weighed = min(PREFILL_MEMORY, room)
        longest_run = max([settings.context, self.weighed, *self.lengths])
        self.ids = token_ids(settings.source, self.model, longest_run)
        for count in settings.prefill:
            if count > room:
                self._fail(EAGER, f"prefill of {count}", f"the model takes {room} tokens")

    def progress(self, step: str) -> None:
        """Say which step begins, and which of how many it is at most."""
        self.done += 1
        count = 2 + len(self.settings.variants) + len(self.settings.prefill)
        count += len(self.settings.variants) if self.settings.memory else 0
        self.step = f"{self.dtype}: step {self.done} of {count}: {step}"
        self.tell(self.step)

    def within(self, how_far: str) -> None:
        """Say how far the step is."""
        self.tell(f"{self.step} | {how_far}")

    def run(self) -> Measured:
        checks = self._checked()
        rows, bandwidth = self._timed()
        return Measured(
            dtype=self.dtype,
            parameter_bytes=parameter_bytes(self.model),
            token_bytes=token_bytes(self.model),
            checks=tuple(checks),
            rows=tuple(rows),
            memory=tuple(self._weighed()) if self.settings.memory else (),
            bandwidth=bandwidth,
            failures=tuple(self.failures),
        )

    @property
    def prompt(self) -> Tensor:
        return self.ids[: self.settings.context]

    def _fail(self, name: str, step: str, error: Exception | str) -> None:
        words = error if isinstance(error, str) else in_words(error)
        self.failures.append(Failure(name, step, words))

    def _checked(self) -> list[Check]:
        """Build every variant and hold it against eager; those that stand are in `variants`."""
        eager = build(EAGER, self.model)
        self.progress("eager in float64")
        truth = find_truth(eager, self.model, self.prompt, self.settings.tokens)
        base = check(eager, truth)
        self.variants, checks = [eager], [base]
        for name in self.settings.variants:
            if name != EAGER and (found := self._check(name, truth)):
                variant, result = found
                checks.append(result)
                if (why := why_wrong(result, base)) is None:
                    self.variants.append(variant)
                else:
                    self._fail(name, "check", why)
        return checks

    def _check(self, name: str, truth: Truth) -> tuple[Variant, Check] | None:
        self.progress(f"checking {name}")
        try:
            variant = build(name, self.model)
            return variant, check(variant, truth)
        except Exception as error:
            self._fail(name, "check", error)
            return None

    def _timed(self) -> tuple[list[Row], Bandwidth | None]:
        settings = self.settings
        self.progress("decoding")
        rows, failures, bandwidth = decode(
            self.variants,
            self.prompt,
            settings.tokens,
            settings.rounds,
            token_bytes(self.model),
            settings.cache,
            self.within,
        )
        self.failures += failures
        for count in self.lengths:
            self.progress(f"prefill of {count}")
            found, failures = prefill(self.variants, self.ids[:count], settings.rounds, self.within)
            rows += found
            self.failures += failures
        return rows, bandwidth

    def _weighed(self) -> list[Memory]:
        """Memory of every variant that stood, in this process and in one of its own."""
        ids, found = self.ids[: self.weighed], []
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
            found.append(Memory(variant.name, self.weighed, **row))
        return found

    def _request(self, name: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "source": settings.source,
            "dtype": self.dtype,
            "variant": name,
            "threads": settings.threads,
            "context": settings.context,
            "tokens": settings.tokens,
            "prefill": self.weighed,
        }
