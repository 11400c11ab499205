"""Whole models of random weights: right first, then decoding, prefill, memory and training."""

from __future__ import annotations

import gc
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu import training
from benchmarks.gpu.memory import peak
from benchmarks.gpu.records import Piece, Row, Run
from benchmarks.gpu.timing import in_turn, on_device, wall
from benchmarks.gpu.variants import (
    COMPILED,
    EACH_PART,
    EVERY,
    FOLDED,
    GROUPS,
    LATE_NORM,
    REDUCED,
    TUNED,
    build,
    is_ours,
    ours,
)
from benchmarks.model_shapes import CONFIGURATIONS
from flashnorm.bench.check import FLOOR, SLACK, Truth, find_truth, margin
from flashnorm.bench.models import open_model, parameter_bytes, token_bytes, token_ids
from flashnorm.bench.records import EAGER, OURS, Timing
from flashnorm.bench.timing import in_words
from flashnorm.bench.variants import Variant, many_compilations
from flashnorm.verification.measure import deviation, first_difference

DECODE, PREFILL, MEMORY, TRAINING = "decode", "prefill", "memory", "training"
PLAIN = (EAGER, OURS)
CONTEXT, TOKENS = 64, 32
COMPILED_LENGTH, WEIGHED_LENGTH = 2048, 8192
LENGTHS = (2048, 8192)
ROUNDS, SECONDS = 7, 10.0
STEPS = 5  # single ones, that are timed on the device
# What a group takes on a card with all that it compiles, for 16 layers; the most that is known.
GROUP_SECONDS = {
    "plain": 25.0,
    "captured": 15.0,
    REDUCED: 42.0,
    TUNED: 60.0,
    "hub kernels": 8.0,
    EACH_PART: 75.0,
}
ORDER = {"mistral-7b": (REDUCED, "captured", TUNED)}  # of the groups, where not all are measured
TIGHT = 0.85  # of the free memory that the weights of the truth may take


def decode(run: Run, name: str) -> Iterator[Piece]:
    """Decoding, group by group of variants; each row holds eager and ours as well."""
    with _compiling(run):
        for group in ORDER.get(name, tuple(GROUPS)):
            key = {"model": name, "group": group}
            yield Piece(DECODE, key, _seconds(name, group), partial(_decode, run, name, group))


def parts(run: Run, name: str) -> Iterator[Piece]:
    """Decoding by a compiled graph of ours, whole and without each part of it."""
    with _compiling(run):
        key = {"model": name, "group": EACH_PART}
        yield Piece(DECODE, key, _seconds(name, EACH_PART), partial(_decode, run, name, EACH_PART))


def _seconds(name: str, group: str) -> float:
    layers = CONFIGURATIONS[name]["num_hidden_layers"]
    return GROUP_SECONDS[group] * (0.5 + 0.5 * layers / 16)


def prefill(run: Run, name: str) -> Iterator[Piece]:
    """One pass that fills a cache, by length."""
    for length in LENGTHS:
        key = {"model": name, "tokens": length, "group": "plain"}
        yield Piece(PREFILL, key, 12.0, partial(_prefill, run, name, length, PLAIN))


def compiled_prefill(run: Run, name: str) -> Iterator[Piece]:
    with _compiling(run):
        key = {"model": name, "tokens": COMPILED_LENGTH, "group": COMPILED}
        names = (*PLAIN, COMPILED, ours(COMPILED), ours(FOLDED), LATE_NORM)
        yield Piece(PREFILL, key, 85.0, partial(_prefill, run, name, COMPILED_LENGTH, names))


def memory(run: Run, name: str) -> Iterator[Piece]:
    """Peaks: of a prefill, of a training step."""
    yield Piece(MEMORY, {"model": name}, 6.0, partial(_memory, run, name))
    yield Piece(TRAINING, {"model": name}, 10.0, partial(_training, run, name))


class Bench:
    """One model on the device, its token ids, and the variants of it that were built."""

    def __init__(self, name: str, device: str, dry: bool) -> None:
        self.name, self.device, self.dry = name, device, dry
        self.model, self.ids = opened("tiny" if dry else name, device)
        self.variants: dict[str, Variant] = {}
        self._truth: Truth | None = None

    @property
    def prompt(self) -> Tensor:
        return self.ids[:CONTEXT]

    def variant(self, name: str) -> Variant:
        if name not in self.variants:
            self.variants[name] = build(name, self.model, self.device)
        return self.variants[name]

    def keep(self, names: tuple[str, ...]) -> None:
        """Free the variants that are none of these."""
        for name in set(self.variants).difference(names):
            del self.variants[name]

    def truth(self) -> Truth:
        """Eager in float64, or in float32 where the card has no memory for that."""
        if self._truth is None:
            room = TIGHT * free_bytes(self.device)
            wide = torch.float64 if 4 * parameter_bytes(self.model) < room else torch.float32
            eager = self.variant(EAGER)
            self._truth = find_truth(eager, self.model, self.prompt, TOKENS, wide)
        return self._truth


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


def bench(run: Run, name: str) -> Bench:
    """The model of this name; another one that was there is freed first."""
    held = run.kept.get("bench")
    if held is None or held.name != name:
        del held
        forget(run)
        run.say(f"{name}: random weights")
        run.kept["bench"] = Bench(name, run.settings.device, run.settings.dry)
    found: Bench = run.kept["bench"]
    return found


def forget(run: Run) -> None:
    run.kept.pop("bench", None)
    gc.collect()
    if run.settings.device != "cpu":
        torch.cuda.empty_cache()


@contextmanager
def _compiling(run: Run) -> Iterator[None]:
    """What is compiled within is forgotten at the end, with the variants that hold it."""
    with many_compilations():
        try:
            yield
        finally:
            if own := run.kept.get("bench"):
                own.keep(PLAIN)


def free_bytes(device: str) -> float:
    return math.inf if device == "cpu" else torch.cuda.mem_get_info()[0]


@contextmanager
def _ready(own: Bench, names: tuple[str, ...]) -> Iterator[tuple[list[Variant], dict[str, str]]]:
    """Those of the variants that can be built, and why the others cannot; freed at the end.

    Eager and ours stay, and so does what was compiled with CUDA graphs, to be timed beside others.
    """
    found, failed = [], {}
    for name in names:
        try:
            found.append(own.variant(name))
        except Exception as error:
            failed[name] = in_words(error)
    try:
        yield found, failed
    finally:
        own.keep(PLAIN + GROUPS[REDUCED])


@torch.no_grad()
def _decode(run: Run, name: str, group: str) -> Row:
    """Seconds per token of a loop, and of single steps on the device alone, after a check.

    What is wrong of the others is timed all the same, and said; what is wrong of ours is not timed.
    """
    own = bench(run, name)
    names = PLAIN + EVERY[group]
    if group == TUNED:
        names += tuple(each for each in GROUPS[REDUCED] if each in own.variants)
    with _ready(own, names) as (variants, failed):
        checks, wrong = _checks(own, variants, failed)
        timed = [
            each
            for each in variants
            if each.name not in failed and not (each.name in wrong and is_ours(each.name))
        ]
        loops = {each.name: partial(each.loop, own.prompt, TOKENS) for each in timed}
        timings, errors = in_turn(loops, 3 if own.dry else ROUNDS, SECONDS)
        alone, more = _on_device(own, [each for each in timed if each.name in timings], timings)
    run.say(f"{name}, decode: {_medians(timings)}")
    size = token_bytes(own.model)
    return {
        **_milliseconds(timings),
        "device_milliseconds": alone,
        "checks": checks,
        "wrong": wrong,
        "token_bytes": size,
        "limit_milliseconds": size / run.ceiling["bytes"] * 1e3,
        "failed": {**failed, **errors, **more},
    }


def _checks(
    own: Bench, variants: list[Variant], failed: dict[str, str]
) -> tuple[dict[str, Row], dict[str, str]]:
    """Tokens and errors of every variant, fed with eager's tokens, and who errs too much."""
    truth, found, wrong = own.truth(), {}, {}
    for variant in variants:
        try:
            found[variant.name] = held = held_against(variant, truth)
        except Exception as error:
            failed[variant.name] = in_words(error)
            continue
        if not held["error"] <= SLACK * held["eager_error"] + FLOOR:
            wrong[variant.name] = (
                f"its logits err by {held['error']:.1e}, eager's by {held['eager_error']:.1e}"
            )
    return found, wrong


def failures(run: Run) -> list[Row]:
    """Rows in which something of ours is wrong."""
    return [row for row in run.store.rows(DECODE) if any(map(is_ours, row["wrong"]))]


def held_against(variant: Variant, truth: Truth) -> Row:
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
        "truth": str(truth.exact.dtype).removeprefix("torch."),
    }


def _on_device(
    own: Bench, variants: list[Variant], timings: dict[str, Timing]
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds that the device works on one step: medians of single ones."""
    found, failed = {}, {}
    for variant in variants:
        try:
            cache, logits = variant.start(own.prompt, TOKENS)
            token, host = logits.argmax(), timings[variant.name].median
            step = partial(variant.step, token, cache)
            step()
            seconds = Timing(tuple(on_device(step, own.device, host) for _ in range(STEPS)))
            found[variant.name] = seconds.median * 1e3
        except Exception as error:
            failed[f"{variant.name}, on the device"] = in_words(error)
    return found, failed


@torch.no_grad()
def _prefill(run: Run, name: str, length: int, names: tuple[str, ...]) -> Row:
    own = bench(run, name)
    ids = own.ids[:length]
    with _ready(own, names) as (variants, failed):
        runs = {each.name: wall(partial(each.prefill, ids), own.device) for each in variants}
        timings, errors = in_turn(runs, 3 if own.dry else ROUNDS, SECONDS)
    run.say(f"{name}, prefill of {length}: {_medians(timings)}")
    return {**_milliseconds(timings), "failed": {**failed, **errors}}


@torch.no_grad()
def _memory(run: Run, name: str) -> Row:
    """The peak of one prefill beyond the weights."""
    own = bench(run, name)
    ids, found = own.ids[:WEIGHED_LENGTH], {}
    with _ready(own, PLAIN) as (variants, failed):
        for variant in variants:
            once = partial(variant.prefill, ids)
            once()
            found[variant.name] = peak(once, own.device)
    run.say(f"{name}, peak of a prefill of {len(ids)}: {found}")
    return {"tokens": len(ids), "bytes": found, "failed": failed}


def _training(run: Run, name: str) -> Row:
    """A step forward and backward: time and peak."""
    own = bench(run, name)
    found = training.measure(own.model, own.ids, own.device)
    run.say(f"{name}, training: {found}")
    return found


def _milliseconds(timings: dict[str, Timing]) -> Row:
    return {"milliseconds": {name: timing.to_json() for name, timing in timings.items()}}


def _medians(timings: dict[str, Timing]) -> str:
    return ", ".join(f"{name} {timing.median * 1e3:.2f} ms" for name, timing in timings.items())
