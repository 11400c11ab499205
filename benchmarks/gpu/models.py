"""Whole models of random weights: right first, then decoding, prefill, memory and training."""

from __future__ import annotations

import gc
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import training
from benchmarks.gpu.memory import peak
from benchmarks.gpu.nouns import Run
from benchmarks.gpu.timing import wall
from benchmarks.model_shapes import CONFIGURATIONS
from flashnorm.bench.check import FLOOR, SLACK, Truth, find_truth, margin
from flashnorm.bench.models import open_model, parameter_bytes, token_bytes, token_ids
from flashnorm.bench.nouns import COMPILE, EAGER, OURS, OURS_COMPILED, Timing
from flashnorm.bench.timing import in_words, interleaved
from flashnorm.bench.variants import Variant, build, many_compilations
from flashnorm.verification.measure import deviation, first_difference

DECODE, PREFILL, MEMORY, TRAINING, ALL = "decode", "prefill", "memory", "training", "compiled"
PLAIN, COMPILED = (EAGER, OURS), (COMPILE, OURS_COMPILED)
CUDA_GRAPHS = "reduce-overhead"  # torch.compile's mode that replays CUDA graphs
CONTEXT, TOKENS = 64, 32
LENGTHS, COMPILED_LENGTH, WEIGHED_LENGTH = (512, 2048, 8192), 2048, 8192
ROUNDS, SECONDS = 7, 12.0
COMPILE_SECONDS = 18.0  # for a model of 16 layers; others in proportion
TIGHT = 0.85  # of the free memory that float64 weights may take


def model(run: Run, name: str) -> None:
    """Everything about one model; what was found before is not measured again."""
    left = [stage for stage in ROWS_OF if not run.store.find(stage, model=name, complete=True)]
    left = [stage for stage in left if not (run.settings.dry and stage in NOT_DRY)]
    if not left:
        return
    run.say(f"{name}: random weights")
    with many_compilations():
        bench = _Model(run, name)
        for stage in left:
            ROWS_OF[stage](bench)
    del bench
    gc.collect()
    if run.settings.device != "cpu":
        torch.cuda.empty_cache()


def opened(name: str, device: str) -> tuple[nn.Module, Tensor]:
    """The model in bf16, made where it stays, and as many token ids as the longest pass takes."""
    content = CONFIGURATIONS[name]
    count = min(max(LENGTHS), content["max_position_embeddings"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(content))
        with torch.device(device):
            made = open_model(str(file), "bf16")
        return made, token_ids(str(file), made, count).to(device)


class _Model:
    """One model, its variants, and where they are kept."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.dry = run, name, run.settings.dry
        self.model, self.ids = opened(name, run.settings.device)
        self.layers = CONFIGURATIONS[name]["num_hidden_layers"]
        self.variants: dict[str, Variant] = {}
        self.failed: dict[str, str] = {}
        self.mode = None if run.settings.device == "cpu" else CUDA_GRAPHS

    @property
    def prompt(self) -> Tensor:
        return self.ids[:CONTEXT]

    def put(self, stage: str, complete: bool, found: dict[str, Any], **key: Any) -> None:
        key = {"model": self.name, **key}
        self.run.store.put(stage, key, {"complete": complete, **found})

    def variant(self, name: str) -> Variant:
        if name not in self.variants:
            self.variants[name] = build(name, self.model, self.mode)
        return self.variants[name]

    def _ready(self, names: tuple[str, ...]) -> list[Variant]:
        """Those of the variants that can be built; why the others cannot is noted."""
        found = []
        for name in names:
            try:
                found.append(self.variant(name))
            except Exception as error:
                self.failed[name] = in_words(error)
        return found

    @torch.no_grad()
    def decode(self) -> None:
        """The variants that need no compiling."""
        self._decode(PLAIN, self._checked(PLAIN))

    @torch.no_grad()
    def compiled(self) -> None:
        """Decoding and one prefill again, of all variants, those of torch.compile among them."""
        self.run.budget.check(len(COMPILED) * self._compiling)
        self.run.say(f"{self.name}: compiling")
        self._decode(PLAIN + COMPILED, self._checked(PLAIN + COMPILED))
        self.run.budget.check(len(COMPILED) * self._compiling)
        length = min(COMPILED_LENGTH, len(self.ids))
        own = [build(name, self.model) for name in COMPILED]
        self._prefill(length, self._ready(PLAIN) + own)
        self.put(ALL, True, {})

    @property
    def _compiling(self) -> float:
        return 0.0 if self.dry else COMPILE_SECONDS * self.layers / 16

    def _decode(self, names: tuple[str, ...], checks: dict[str, Any]) -> None:
        runs = {
            name: partial(self.variants[name].loop, self.prompt, TOKENS)
            for name in names
            if name not in self.failed
        }
        timings, errors = interleaved(runs, self.rounds, SECONDS)
        size = token_bytes(self.model)
        row = {
            **_milliseconds(timings),
            "checks": checks,
            "token_bytes": size,
            "limit_milliseconds": size / self.run.ceiling["bytes"] * 1e3,
            "failed": {**self.failed, **errors},
        }
        self.put(DECODE, True, row)
        self.run.say(f"{self.name}, decode: {_medians(timings)}")

    @property
    def rounds(self) -> int:
        return 3 if self.dry else ROUNDS

    def _checked(self, names: tuple[str, ...]) -> dict[str, Any]:
        """All variants against eager in float64 at full depth, where there is memory for it."""
        enough = 4 * parameter_bytes(self.model) < TIGHT * free_bytes(self.run.settings.device)
        eager = self.variant(EAGER)
        truth = find_truth(eager, self.model, self.prompt, TOKENS) if enough else None
        return {name: found for name in names if (found := self._held(name, truth))}

    def _held(self, name: str, truth: Truth | None) -> dict[str, Any]:
        """Tokens and errors of a variant, fed with eager's tokens; a failure is noted."""
        try:
            variant = self.variant(name)
            found = held(variant, truth) if truth else {}
        except Exception as error:
            self.failed[name] = in_words(error)
            return {}
        if found and not found["error"] <= SLACK * found["eager_error"] + FLOOR:
            self.failed[name] = f"its logits err by {found['error']:.1e}: not timed"
        return found

    @torch.no_grad()
    def prefill(self) -> None:
        """One pass that fills a cache, by length."""
        for length in sorted({min(length, len(self.ids)) for length in LENGTHS}):
            if not self.run.store.find(PREFILL, model=self.name, tokens=length):
                self.run.budget.check(SECONDS)
                self._prefill(length, self._ready(PLAIN))
        self.put(PREFILL, True, {}, tokens="all")

    def _prefill(self, length: int, variants: list[Variant]) -> None:
        runs: dict[str, Callable[[], float]] = {
            each.name: wall(partial(each.prefill, self.ids[:length]), self.run.settings.device)
            for each in variants
        }
        timings, errors = interleaved(runs, self.rounds, SECONDS)
        self.put(
            PREFILL,
            False,
            {**_milliseconds(timings), "failed": {**self.failed, **errors}},
            tokens=length,
        )
        self.run.say(f"{self.name}, prefill of {length}: {_medians(timings)}")

    @torch.no_grad()
    def memory(self) -> None:
        """The peak of one prefill beyond the weights."""
        ids = self.ids[: min(WEIGHED_LENGTH, len(self.ids))]
        found = {}
        for variant in self._ready(PLAIN):
            run = partial(variant.prefill, ids)
            run()
            found[variant.name] = peak(run, self.run.settings.device)
        self.put(MEMORY, True, {"tokens": len(ids), "bytes": found})
        self.run.say(f"{self.name}, peak of a prefill of {len(ids)}: {found}")

    def training(self) -> None:
        """A step forward and backward: time and peak."""
        self.run.budget.check(SECONDS)
        found = training.measure(self.model, self.ids, self.run.settings.device)
        self.put(TRAINING, True, found)
        self.run.say(f"{self.name}, training: {found}")


ROWS_OF: dict[str, Callable[[_Model], None]] = {
    DECODE: _Model.decode,
    PREFILL: _Model.prefill,
    MEMORY: _Model.memory,
    TRAINING: _Model.training,
    ALL: _Model.compiled,
}
NOT_DRY = (ALL,)  # a dry run compiles nothing


def free_bytes(device: str) -> float:
    return math.inf if device == "cpu" else torch.cuda.mem_get_info()[0]


def held(variant: Variant, truth: Truth) -> dict[str, Any]:
    """How many greedy tokens are eager's, the margin where the first is not, and the error.

    Fed with eager's tokens, a variant writes the same text up to the first token that differs.
    """
    steps = variant.forced(truth.prompt, truth.written)
    first = first_difference(truth.written, steps.argmax(-1))
    exact = truth.exact[-len(steps) :]
    return {
        "equal": len(steps) if first is None else first,
        "tokens": len(steps),
        "margin": None if first is None else margin(truth.logits[first]),
        "error": deviation([steps], [exact]).rms,
        "eager_error": deviation([truth.logits], [exact]).rms,
    }


def _milliseconds(timings: dict[str, Timing]) -> dict[str, Any]:
    return {"milliseconds": {name: timing.to_json() for name, timing in timings.items()}}


def _medians(timings: dict[str, Timing]) -> str:
    return ", ".join(f"{name} {timing.median * 1e3:.2f} ms" for name, timing in timings.items())
