"""Figures of one model, and of two models' outputs. Everything is reduced in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.verification.inputs import longest, model_inputs, output_of, run
from flashnorm.verification.report import Deviation, Pair

TEXT_WINDOW = 512
GREEDY_TOKENS = 64
PROMPT_TOKENS = 32


def deviation(values: Sequence[Tensor], truths: Sequence[Tensor]) -> Deviation:
    """How far `values` are from `truths`, window by window: [..., n] each, of equal shapes."""
    largest, scale, squares, power = [], [], [], []
    for value, truth in zip(values, truths, strict=True):
        truth = truth.double().reshape(-1, truth.shape[-1])
        delta = value.double().reshape(truth.shape) - truth
        largest.append(delta.abs().max())
        scale.append(truth.abs().max())
        squares.append(delta.square().sum())
        power.append(truth.square().sum())
    return Deviation(
        max=_ratio(torch.stack(largest).max(), torch.stack(scale).max()),
        rms=_ratio(torch.stack(squares).sum().sqrt(), torch.stack(power).sum().sqrt()),
        typical=_geometric_mean(_row_errors(values, truths)),
    )


def pair(reference: Sequence[Tensor], candidate: Sequence[Tensor], truth: Sequence[Tensor]) -> Pair:
    """Both models against one truth, and how sure their ratio is."""
    before, after = _row_errors(reference, truth), _row_errors(candidate, truth)
    logs = after.log() - before.log()  # [T]
    spread = float(logs.std() / logs.numel() ** 0.5) if logs.numel() > 1 else 0.0
    return Pair(deviation(reference, truth), deviation(candidate, truth), spread)


def divergence(truths: Sequence[Tensor], values: Sequence[Tensor]) -> float:
    """Mean over rows of KL(truth ‖ value) = Σ p·(log p − log q), in nats, from logits [..., V]."""
    total, rows = 0.0, 0
    for truth, value in zip(truths, values, strict=True):
        log_p, log_q = truth.double().log_softmax(-1), value.double().log_softmax(-1)
        per_row = (log_p.exp() * (log_p - log_q)).nan_to_num(nan=0.0).sum(-1)  # 0·(−∞ + ∞) is 0
        total, rows = total + float(per_row.sum()), rows + per_row.numel()
    return max(0.0, total / rows)


@dataclass(frozen=True)
class Reading:
    """What one model makes of a text: `perplexity`, and its `favourites` [N], the top-1 tokens."""

    perplexity: float
    favourites: Tensor
    tokens: int
    window: int


def read_text(model: nn.Module, ids: Tensor) -> Reading:
    """exp(mean −log p(next token)) over `ids` [N], in windows that start without context."""
    window = min(TEXT_WINDOW, longest(model), len(ids))
    pieces = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    outputs = (output_of(run(model, model_inputs(model, piece)))[1][0].cpu() for piece in pieces)
    return reading_of(pieces, outputs)


def reading_of(pieces: Sequence[Tensor], outputs: Iterable[Tensor]) -> Reading:
    """The same from the logits [T, V] that a model gave for each piece [T] of a text."""
    losses, favourites = [], []
    for piece, logits in zip(pieces, outputs, strict=True):
        favourites.append(logits.argmax(-1))
        losses.append(nn.functional.cross_entropy(logits[:-1].float(), piece[1:], reduction="none"))
    loss = torch.cat(losses).double()
    mean = float(loss.mean())
    perplexity = exp(mean) if mean < 700 else float("inf")
    return Reading(perplexity, torch.cat(favourites), loss.numel(), len(pieces[0]))


@dataclass(frozen=True)
class Writing:
    """What one model writes: the greedy `ids` [S] and the `logits` [S, V] they were chosen by."""

    ids: Tensor
    logits: Tensor


def write_text(model: Any, prompt: Tensor) -> Writing:
    """GREEDY_TOKENS tokens after `prompt` [T], the largest logit each time, never ending early."""
    steps = min(GREEDY_TOKENS, longest(model) - len(prompt))
    result = model.generate(
        prompt[None].to(model.device),
        attention_mask=torch.ones_like(prompt[None]).to(model.device),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=steps,
        min_new_tokens=steps,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat([step.cpu() for step in result.logits])  # [S, V]
    return Writing(result.sequences[0, len(prompt) :].cpu(), logits)


def first_difference(a: Tensor, b: Tensor) -> int | None:
    """The first index at which two token rows differ, None where they do not."""
    length = min(len(a), len(b))
    differing = (a[:length] != b[:length]).nonzero()
    if len(differing):
        return int(differing[0])
    return None if len(a) == len(b) else length


def _ratio(a: Tensor, b: Tensor) -> float:
    if float(a) == 0:
        return 0.0
    return float(a / b) if float(b) != 0 else float("inf")


def _row_errors(values: Sequence[Tensor], truths: Sequence[Tensor]) -> Tensor:
    """‖Δ_row‖ / ‖truth_row‖ of every row: [T]; no less than the unit of float64."""
    found = []
    for value, truth in zip(values, truths, strict=True):
        truth = truth.double().reshape(-1, truth.shape[-1])
        rows = (value.double().reshape(truth.shape) - truth).norm(dim=-1)
        found.append(rows / truth.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny))
    return torch.cat(found).clamp_min(torch.finfo(torch.float64).eps)


def _geometric_mean(values: Tensor) -> float:
    if bool((values <= torch.finfo(torch.float64).eps).all()):
        return 0.0
    return float(values.log().mean().exp())
