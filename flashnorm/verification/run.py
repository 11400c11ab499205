"""verify: does the candidate compute what the reference computes?"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.checkpoint.twins import why_untied
from flashnorm.errors import FlashNormError
from flashnorm.graph.ambient import on_cpu
from flashnorm.graph.packed import find_held
from flashnorm.loading import load_tokenizer, locate
from flashnorm.verification import inputs as feed
from flashnorm.verification import measure
from flashnorm.verification.bounds import Size, output_bound, width_of
from flashnorm.verification.choices import Choices
from flashnorm.verification.folded import NOT_COMPARED, compared_weights, may_be_fold
from flashnorm.verification.inputs import Inputs, Samples
from flashnorm.verification.layers import counted_matrices, layer_errors
from flashnorm.verification.packed import PACKED
from flashnorm.verification.precision import Float64Mode, float64_truth, in_dtype, parameter_dtype
from flashnorm.verification.report import Greedy, LayerError, Perplexity, Report
from flashnorm.verification.streaming import Progress, Source, Stepper, opened, shortened, streams

STEPS = ("float64", "float32", "perplexity", "greedy tokens", "half precision")


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured on one model."""

    name: str
    output: str
    truth: list[Tensor]
    single: list[Tensor]
    half: list[Tensor] | None
    size: Size
    choices: Choices
    reading: measure.Reading | None
    writing: measure.Writing | None
    notes: tuple[str, ...]


@on_cpu()
def verify(
    reference: Source,
    candidate: Source,
    *,
    text: str | None = None,
    tokens: int = 4096,
    sample: int = 512,
    example_inputs: Inputs | None = None,
    tokenizer: Any | None = None,
    stream: bool | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure whether `candidate` computes what `reference` computes; the Report has the verdict.

    Each model is a live module (left as it was), a directory, a GGUF file or a hub id. Models that
    are named are loaded one after the other, so that only one is in memory at a time, in its stored
    dtype and in float64. The verdict is ok where

    - in float64, casts included, max|Δ| / max|y| is within `bounds.output_bound`, where discrete
      choices that tie (a router's experts) are taken from the reference;
    - in half precision (the reference's own, else bfloat16) the candidate's error against that
      float64 truth is at most `bounds.HALF_RATIO` times the reference's own, beyond chance: two
      standard errors over the compared positions;
    - the greedy tokens are equal, or part where the reference's margin is smaller than the float32
      difference of the two models (and than what its bound allows);
    - where both are directories and the candidate says that this version folded it: its tensors
      are, bit for bit, what the fold makes (`verify_weights`), but for sums.

    text: what is read, default a shipped public-domain text; tokens: how many of its tokens carry
    the perplexity (float32); sample: how many are compared in full. tokenizer: default the
    reference's. Without one, seeded random tokens are read. example_inputs: a dict of keyword
    arguments or a tuple, or a list of several, for modules that do not read token ids; then
    perplexity and greedy tokens are None. stream: read safetensors from disk for every pass, by
    default where a model would not fit in memory; then one window is read and nothing generated, so
    the greedy tokens are None. progress is called with (steps done, steps in total, name of the
    next step).

    Raises FlashNormError where a source does not exist, the inputs do not fit, or the outputs have
    different shapes, and CheckpointError where a source cannot be read.
    """
    start = time.perf_counter()
    step = Stepper(progress, 2 * len(STEPS) + may_be_fold(reference, candidate))
    for source in (reference, candidate):
        if not isinstance(source, nn.Module):
            locate(source)  # a misspelt candidate is found before the reference is measured
            if why := why_untied(Path(source).expanduser()):
                warnings.warn(f"{source}: {why}", stacklevel=3)
    streamed = streams((reference, candidate), stream)
    with opened(reference, streamed, step.told) as model:
        samples = _samples(
            reference, model, example_inputs, tokenizer, text, tokens, sample, streamed
        )
        half = _half_dtype(model)
        first = _examine(_name(reference), model, samples, half, step)
    with opened(candidate, streamed, step.told) as model:
        second = _examine(_name(candidate), model, samples, half, step, first)
    report = _compare(first, second, samples, half)
    if may_be_fold(reference, candidate):
        step(f"{_name(candidate)}: weights")
        weights = compared_weights(reference, candidate, step.told)
        notes = report.notes if weights else (*report.notes, NOT_COMPARED)
        report = replace(report, weights=weights, notes=notes)
    if not report.checks[0].ok:
        report = replace(report, layers=_locate(reference, candidate, samples, report))
    return replace(report, seconds=time.perf_counter() - start)


def _examine(
    name: str,
    model: nn.Module,
    samples: Samples,
    half: torch.dtype,
    step: Stepper,
    guide: Outcome | None = None,
) -> Outcome:
    """Run one model in float64, float32 and half precision, and let it read and write.

    In float64 it follows the discrete choices of `guide` where they tie.
    """
    step(f"{name}: {STEPS[0]}")
    stored, width = parameter_dtype(model), width_of(model)
    choices = Choices()
    if guide is not None:
        choices = guide.choices.follower(_tolerance(guide, stored))
    with (
        in_dtype(model, torch.float64),
        float64_truth(choices) as mode,
        counted_matrices(model) as count,
    ):
        truth = _true_outputs(name, model, samples)
    size = Size(width, max(1, count[0] // len(samples.windows)), stored)
    output = truth[0][0]
    told: list[str] = []
    with torch.no_grad(), in_dtype(model, torch.float32, notes=told):
        step(f"{name}: {STEPS[1]}")
        single = _outputs(model, samples)
        ids = samples.ids if output == "logits" and feed.writes_tokens(model) else None
        step(f"{name}: {STEPS[2]}")
        reading = None if ids is None else _read(model, ids, samples, single)
        step(f"{name}: {STEPS[3]}")
        writing = None
        if ids is not None and not samples.streamed:
            writing = measure.write_text(model, ids[: measure.PROMPT_TOKENS])
    step(f"{name}: {STEPS[4]}")
    notes = [*_own_notes(name, mode, choices), *(f"{name}: {note}" for note in told)]
    if packed := len(find_held(model)):
        notes.append(PACKED.format(name, packed))
    lower = _half_outputs(name, model, samples, half, notes)
    values = [value.cpu() for _, value in truth]
    return Outcome(
        name, output, values, single, lower, size, choices, reading, writing, tuple(notes)
    )


def _read(
    model: nn.Module, ids: Tensor, samples: Samples, single: list[Tensor]
) -> measure.Reading | None:
    """Perplexity; of the float32 outputs at hand where another pass would read the disk again."""
    if not samples.streamed:
        return measure.read_text(model, ids)
    return measure.reading_of([ids], [single[0][0]]) if len(ids) > 1 else None


def _tolerance(guide: Outcome, stored: torch.dtype) -> float:
    """How far, relative to the largest, rounding may move a score of a model stored like this."""
    return output_bound(replace(guide.size, stored=stored), torch.float64)


def _own_notes(name: str, mode: Float64Mode, choices: Choices) -> list[str]:
    notes = [f"{name}: {leak} stayed below float64" for leak in sorted(mode.leaks)]
    if choices.turned:
        notes.append(
            f"{choices.turned} discrete choices (such as a router's experts) tie within rounding "
            "and fall otherwise in the candidate; in float64 it was made to follow the reference"
        )
    return notes


def _true_outputs(name: str, model: nn.Module, samples: Samples) -> list[tuple[str, Tensor]]:
    """The first run of a model: here it shows whether the inputs fit."""
    try:
        return [feed.output_of(feed.run(model, window)) for window in samples.windows]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise FlashNormError(
            f"{name} does not run on {samples.origin} ({type(error).__name__}: {error}): pass "
            "example_inputs=, a dict of keyword arguments or a tuple of positional ones"
        ) from error


def _half_outputs(
    name: str, model: nn.Module, samples: Samples, half: torch.dtype, notes: list[str]
) -> list[Tensor] | None:
    """The outputs in half precision; None, and a note, for a model that mixes dtypes then."""
    failure = ""
    for narrow_tables in (False, True):
        try:
            how: dict[str, Any] = {"narrow_tables": narrow_tables, "notes": notes}
            with torch.no_grad(), in_dtype(model, half, **how):
                return _outputs(model, samples)
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
    notes.append(f"{name} does not run in {_dtype_name(half)}: {failure}")
    return None


def _outputs(model: nn.Module, samples: Samples) -> list[Tensor]:
    return [feed.output_of(feed.run(model, window))[1].cpu() for window in samples.windows]


def _compare(first: Outcome, second: Outcome, samples: Samples, half: torch.dtype) -> Report:
    """The figures of two outcomes, without the search for the place of an error."""
    _check_shapes(first, second)
    size = Size(first.size.width, first.size.depth, second.size.stored)
    logits = first.output == "logits"
    lower = None
    if first.half is not None and second.half is not None:
        lower = measure.pair(first.half, second.half, first.truth)
    single, bound = (
        measure.deviation(second.single, first.single),
        output_bound(size, torch.float32),
    )
    return Report(
        reference=first.name,
        candidate=second.name,
        output=first.output,
        inputs=samples.origin,
        rows=sum(window.numel() // window.shape[-1] for window in first.truth),
        width=size.width,
        depth=size.depth,
        stored=_dtype_name(size.stored),
        float64=measure.deviation(second.truth, first.truth),
        float64_bound=output_bound(size, torch.float64),
        float32=single,
        float32_bound=bound,
        precise=measure.pair(first.single, second.single, first.truth),
        half_dtype=_dtype_name(half),
        half=lower,
        kl=measure.divergence(first.truth, second.truth) if logits else None,
        perplexity=_perplexity(first.reading, second.reading),
        greedy=_greedy(first.writing, second.writing, min(single.max, bound), samples),
        layers=(),
        notes=_notes(first, second, samples),
        seconds=0.0,
    )


def _perplexity(a: measure.Reading | None, b: measure.Reading | None) -> Perplexity | None:
    if a is None or b is None:
        return None
    top1 = float((a.favourites == b.favourites).double().mean())
    return Perplexity(a.perplexity, b.perplexity, top1, a.tokens, a.window)


def _greedy(
    a: measure.Writing | None, b: measure.Writing | None, error: float, samples: Samples
) -> Greedy | None:
    """Two logits that may each move by `error`, relative to the largest, make a tie within 2."""
    if a is None or b is None or samples.ids is None:
        return None
    index = measure.first_difference(a.ids, b.ids)
    logits = a.logits[index if index is not None else slice(None)].double()
    tolerance = 2 * error * float(logits.abs().max())
    margin = None
    if index is not None and index < min(len(a.ids), len(b.ids)):
        margin = float(logits[a.ids[index]] - logits[b.ids[index]])
    texts = None
    if samples.tokenizer is not None:
        texts = (samples.tokenizer.decode(a.ids), samples.tokenizer.decode(b.ids))
    prompt = min(measure.PROMPT_TOKENS, len(samples.ids))
    return Greedy(
        tuple(a.ids.tolist()), tuple(b.ids.tolist()), index, margin, tolerance, prompt, texts
    )


def _notes(first: Outcome, second: Outcome, samples: Samples) -> tuple[str, ...]:
    notes = [*samples.notes, *first.notes, *second.notes]
    if samples.ids is not None and first.reading is None:
        notes.append("the model does not predict its next token: no perplexity, no greedy tokens")
    if first.output != second.output:
        notes.append(f"{first.output} of the reference against {second.output} of the candidate")
    return tuple(notes)


def _check_shapes(first: Outcome, second: Outcome) -> None:
    a, b = tuple(first.truth[0].shape), tuple(second.truth[0].shape)
    if a != b:
        raise FlashNormError(
            f"{first.name} gives {first.output} of shape {a}, {second.name} gives {second.output} "
            f"of shape {b}: these are not two versions of one model"
        )


def _locate(
    reference: Source, candidate: Source, samples: Samples, report: Report
) -> tuple[LayerError, ...]:
    """Both models once more, side by side, on the first window."""
    window = shortened(samples.windows[0]) if samples.streamed else samples.windows[0]
    streamed = samples.streamed
    with opened(reference, streamed) as a, opened(candidate, streamed) as b:
        return layer_errors(a, b, window, report.float64_bound)


def _samples(
    source: Source,
    model: nn.Module,
    example_inputs: Inputs | None,
    tokenizer: Any | None,
    text: str | None,
    tokens: int,
    sample: int,
    streamed: bool,
) -> Samples:
    if example_inputs is not None:
        return replace(feed.own_inputs(example_inputs), streamed=streamed)
    if not feed.reads_tokens(model):
        raise FlashNormError(
            f"{_name(source)} does not start from token ids: pass example_inputs=, a dict of "
            "keyword arguments or a tuple of positional ones"
        )
    if tokenizer is None and not isinstance(source, nn.Module):
        tokenizer = load_tokenizer(source)
    return feed.token_samples(model, tokenizer, text, max(2, tokens), max(1, sample), streamed)


def _half_dtype(model: nn.Module) -> torch.dtype:
    return torch.float16 if parameter_dtype(model) == torch.float16 else torch.bfloat16


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(source: Source) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else os.fspath(source)
