"""Timing the variants of one model: decoding beside the read bandwidth, prefill per length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
from flashnorm.bench.variants import Variant
from flashnorm.kernels.cpu.library import load

MEMORY, WEIGHTS = ("read", "memory"), ("read", "weights")  # beside (kind, variant)

Found = tuple[list[Row], list[Failure]]
Progress = Callable[[str], None]


def decode(
    variants: Sequence[Variant],
    prompt: Tensor,
    tokens: int,
    rounds: int,
    token_bytes: int,
    cache: int,
    progress: Progress = lambda said: None,
) -> tuple[list[Row], list[Failure], Bandwidth | None]:
    """Time per token of every variant, both ways, and the bandwidth in the same rounds."""
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    for variant in variants:
        runs[GENERATE, variant.name] = partial(_generate, variant, prompt, tokens)
        runs[FORWARD, variant.name] = partial(variant.loop, prompt, tokens)
    if not isinstance(library := load(), str):
        runs[MEMORY] = memory_reader(library, cache)
        runs[WEIGHTS] = weights_reader(library, token_bytes)
    timings, errors = interleaved(runs, rounds, progress=progress)
    bandwidth = _bandwidth(timings)
    rows = [
        _decode_row(kind, variant.name, timings, token_bytes, bandwidth)
        for kind in (GENERATE, FORWARD)
        for variant in variants
        if (kind, variant.name) in timings
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
    token_bytes: int,
    bandwidth: Bandwidth | None,
) -> Row:
    timing = timings[kind, name]
    rate = token_bytes / timing.median / 1e9
    return Row(
        kind,
        1,
        name,
        timing,
        _speedup(timings.get((kind, EAGER)), timing),
        rate,
        rate / bandwidth.memory if bandwidth else None,
        rate / bandwidth.weights if bandwidth else None,
    )


def prefill(
    variants: Sequence[Variant],
    ids: Tensor,
    rounds: int,
    progress: Progress = lambda said: None,
) -> Found:
    """Time of one pass over `ids` [T] that fills a cache, for every variant."""
    runs = {each.name: stopwatch(partial(each.prefill, ids)) for each in variants}
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
