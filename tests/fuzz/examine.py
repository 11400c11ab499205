"""One seed, from its model to a verdict; what a process of a pool runs."""

from __future__ import annotations

from dataclasses import fields

import torch

from tests.fuzz.draft import draft
from tests.fuzz.oracle import Options, Verdict, judge
from tests.fuzz.shrink import fails_alike, fewest, shrink


def examine(seed: int) -> Verdict:
    """The verdict on the model of a seed; a counterexample's detail is its smallest form."""
    program, options = draft(seed), Options.of(seed)
    verdict = judge(program, seed, options)
    if verdict.wrong:
        verdict.detail = counterexample(seed, verdict)
    return verdict


def counterexample(seed: int, verdict: Verdict) -> str:
    program, options = draft(seed), Options.of(seed)
    small = shrink(program, fails_alike(seed, options, verdict.wrong))
    options = fewest(small, seed, options, verdict.wrong)
    small = shrink(small, fails_alike(seed, options, verdict.wrong))
    said = ", ".join(f.name for f in fields(options) if getattr(options, f.name)) or "none"
    detail = judge(small, seed, options).detail
    return f"# seed {seed}: {verdict.wrong}; options: {said}\n{small.source}\n{detail}\n"


def one_thread() -> None:
    torch.set_num_threads(1)
