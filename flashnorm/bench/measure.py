"""Timing the variants of one model: decoding beside the read bandwidth, prefill per length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from torch import Tensor

from flashnorm.bench.machine import memory_reader, weights_reader
from flashnorm.bench.records import (
    EAGER,
    FORWARD,
    GENERATE,
    PREFILL,
    Bandwidth,
    Failure,
    Row,
    Timing,
)
from flashnorm.bench.timing import interleaved, stopwatch
from flashnorm.bench.variants import LONG, Variant
from flashnorm.kernels.cpu.library import load

MEMORY, WEIGHTS = ("read", "memory"), ("read", "weights")  # beside (kind, variant)

Found = tuple[list[Row], list[Failure]]
Progress = Callable[[str], None]
# Engines in other processes by their names, each a function that returns seconds.
Others = Mapping[str, Callable[[], float]]


def decode(
    variants: Sequence[Variant],
    prompt: Tensor,
    tokens: int,
    rounds: int,
    token_bytes: int,
    cache: int,
    progress: Progress = lambda said: None,
    others: Others = MappingProxyType({}),
) -> tuple[list[Row], list[Failure], Bandwidth | None]:
    """Time per token of every variant, both ways, and the bandwidth in the same rounds.

    `others` write their text as `generate()` does. That reads its prompt in every run: after a
    long one there is the loop alone, with the others beside it.
    """
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    short = len(prompt) <= LONG
    for variant in variants:
        if short:
            runs[GENERATE, variant.name] = partial(_generate, variant, prompt, tokens)
        runs[FORWARD, variant.name] = partial(variant.loop, prompt, tokens)
    for name, run in others.items():
        runs[GENERATE if short else FORWARD, name] = run
    if not isinstance(library := load(), str):
        runs[MEMORY] = memory_reader(library, cache)
        runs[WEIGHTS] = weights_reader(library, token_bytes)
    timings, errors = interleaved(runs, rounds, progress=progress)
    for variant in variants:
        variant.forget()
    bandwidth = _bandwidth(timings)
    rows = [
        _decode_row(
            kind, name, timings, None if name in others else token_bytes, bandwidth, len(prompt)
        )
        for kind in (GENERATE, FORWARD)
        for name in (*(variant.name for variant in variants), *others)
        if (kind, name) in timings
    ]
    return rows, [Failure(name, kind, error) for (kind, name), error in errors.items()], bandwidth


def _generate(variant: Variant, prompt: Tensor, tokens: int) -> float:
    return variant.generate(prompt, tokens)[0]


def _bandwidth(timings: dict[tuple[str, str], Timing]) -> Bandwidth | None:
    if MEMORY not in timings or WEIGHTS not in timings:
        return None
    return Bandwidth(1e-9 / timings[MEMORY].median, 1e-9 / timings[WEIGHTS].median)


def _decode_row(
    kind: str,
    name: str,
    timings: dict[tuple[str, str], Timing],
    token_bytes: int | None,
    bandwidth: Bandwidth | None,
    context: int,
) -> Row:
    timing = timings[kind, name]
    rate = None if token_bytes is None else token_bytes / timing.median / 1e9
    return Row(
        kind,
        1,
        name,
        timing,
        _speedup(timings.get((kind, EAGER)), timing),
        rate,
        rate / bandwidth.memory if rate and bandwidth else None,
        rate / bandwidth.weights if rate and bandwidth else None,
        context,
    )


def prefill(
    variants: Sequence[Variant],
    ids: Tensor,
    rounds: int,
    progress: Progress = lambda said: None,
    others: Others = MappingProxyType({}),
) -> Found:
    """Time of one pass over `ids` [T] that fills a cache, for every variant and the `others`."""
    runs = {each.name: stopwatch(partial(each.prefill, ids)) for each in variants} | dict(others)
    timings, errors = interleaved(runs, rounds, progress=progress)
    eager = timings.get(EAGER)
    rows = [
        Row(PREFILL, len(ids), name, timing, _speedup(eager, timing))
        for name, timing in timings.items()
    ]
    step = f"{PREFILL} of {len(ids)}"
    return rows, [Failure(name, step, error) for name, error in errors.items()]


def _speedup(eager: Timing | None, timing: Timing) -> float | None:
    return None if eager is None else eager.median / timing.median
