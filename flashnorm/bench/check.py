"""Whether a variant computes what eager computes: tokens against tokens, errors against float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashnorm.bench.records import Check
from flashnorm.bench.variants import Variant
from flashnorm.verification.inputs import run
from flashnorm.verification.measure import deviation, first_difference
from flashnorm.verification.precision import float64_truth, in_dtype

MOST_POSITIONS = 96  # whose logits are compared in one pass
SLACK = 2.0  # so many times eager's error is still rounding
FLOOR = 1e-6


@dataclass(frozen=True)
class Truth:
    """What eager says: `written` [S] greedy tokens, `logits` [S, V] before each, in its own dtype.

    `exact` [K, V] are the last K logits of one float64 pass over `ids`, the prompt and all but the
    last token written.
    """

    prompt: Tensor
    written: Tensor
    logits: Tensor
    exact: Tensor

    @property
    def ids(self) -> Tensor:
        return torch.cat([self.prompt, self.written[:-1]])


def find_truth(
    eager: Variant,
    model: nn.Module,
    prompt: Tensor,
    tokens: int,
    wide: torch.dtype = torch.float64,
) -> Truth:
    """What every variant is held against. The weights are held in `wide` meanwhile.

    Float32 is enough to hold half precision against, where there is no memory for float64.
    """
    written = eager.generate(prompt, tokens)[1]
    ids = torch.cat([prompt, written[:-1]])
    kept = min(len(ids), max(MOST_POSITIONS, tokens))
    exactly = float64_truth() if wide == torch.float64 else nullcontext()
    with in_dtype(model, wide), exactly:
        if eager.keeps_logits:
            exact = eager.model(ids[None], use_cache=False, logits_to_keep=kept).logits[0]
        else:
            exact = run(model, {"input_ids": ids[None]}).logits[0, -kept:]
    return Truth(prompt, written, eager.forced(prompt, written), exact)


def check(variant: Variant, truth: Truth) -> Check:
    """Hold a variant against the truth."""
    written = variant.generate(truth.prompt, len(truth.written))[1]
    first = first_difference(truth.written, written)
    apart = None if first is None else margin(truth.logits[first])
    steps = variant.forced(truth.prompt, truth.written)
    whole = variant.logits(truth.ids, len(truth.exact))
    return Check(
        variant=variant.name,
        equal=len(written) if first is None else first,
        tokens=len(written),
        first=first,
        margin=apart,
        pass_error=deviation([whole], [truth.exact]).rms,
        decode_error=deviation([steps], [truth.exact[-len(steps) :]]).rms,
    )


def why_far(variant: Variant, eager: Tensor, prompt: Tensor, base: Check) -> str | None:
    """Why a variant is not worth timing after a longer prompt, or None: held against eager alone.

    Both err, so that they may be apart by the sum. `eager` [S, V] are its logits after the prompt
    and S − 1 tokens zero.
    """
    steps = variant.forced(prompt, prompt.new_zeros(len(eager)))
    apart, allowed = deviation([steps], [eager]).rms, (1 + SLACK) * base.decode_error + FLOOR
    if apart <= allowed:
        return None
    return f"its logits are {apart:.1e} from eager's, {allowed:.1e} is rounding: not timed"


def margin(logits: Tensor) -> float:
    """By how much the largest of `logits` [V] exceeds the second."""
    best = logits.double().topk(2).values
    return float(best[0] - best[1])


def why_wrong(found: Check, eager: Check) -> str | None:
    """Why a variant is not worth timing, or None: errors far beyond eager's are no rounding."""
    pairs = (
        ("one pass", found.pass_error, eager.pass_error),
        ("decoding", found.decode_error, eager.decode_error),
    )
    for name, error, allowed in pairs:
        if not error <= SLACK * allowed + FLOOR:  # also where the error is no number
            return f"its logits of {name} err by {error:.1e}, eager's by {allowed:.1e}: not timed"
    return None
