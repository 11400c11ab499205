"""A row of the coverage page: what became of one model type."""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

import flashnorm

from .build import causal_lm_types
from .classes import WHOLE, NoModel, model_class
from .fold import fold_outcome, needed_refusals, specimen
from .further import NotTiny
from .overrides import UNBUILDABLE
from .variants import VARIANTS

EXACT = 1e-11
FIELDS = {"gain": "gain_state"}
MEMORY = 12 << 30
# (on its own inputs, with everything that fold_ can do)
RUNS = ((True, False), (True, True), (False, False))


@dataclass
class Row:
    """One type or variant. `error` and `noise` as in `Outcome`; `cause` where there is none.

    `states` counts, per field of a site, what happens to it: {"gain": {"folded": 5}, ...}; gains
    and biases as they fold by default, centering and scales with everything else asked for.
    """

    name: str
    group: str = "causal"
    model: str = ""
    inputs: list[str] = field(default_factory=list)
    traced: bool = False
    default_inputs: bool = False
    sites: int = 0
    unreached: int = 0
    states: dict[str, dict[str, int]] = field(default_factory=dict)
    error: float | None = None
    noise: float | None = None
    refused_gains: int = 0
    refusals_needed: int = 0
    unneeded: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # of the processor, all in all
    fold_seconds: float = 0.0  # to build it, and to fold it on its own inputs
    category: str = ""
    cause: str = ""

    @property
    def wrong(self) -> bool:
        """Moved by more than rounding: where rounding alone moves it further, nothing is known."""
        return self.error is not None and self.error > max(EXACT, 10 * (self.noise or 0.0))

    @property
    def exact(self) -> bool:
        return self.error is not None and self.error <= EXACT

    def count(self, state: str, value: str) -> int:
        return self.states.get(state, {}).get(value, 0)


def group_of(name: str) -> str:
    if name in VARIANTS or name.endswith(WHOLE):
        return "variant"
    return "causal" if name in causal_lm_types() else "further"


def measure(name: str, full: bool = True) -> Row:
    """Fold one type on its own inputs and on the default ones; the worse of the two counts.

    Not `full`: on its own inputs only, and no refusal is tried.
    """
    started = time.process_time()
    row = Row(name, group_of(name))
    if name in UNBUILDABLE:
        row.category = "cannot be built by transformers itself"
        row.cause = UNBUILDABLE[name]
        return row
    try:
        _describe(row)
    except (NoModel, NotTiny) as error:
        row.category, row.cause = error.category, str(error)
    else:
        _fold(row, full)
    row.seconds = round(time.process_time() - started, 1)
    return row


def prepare() -> None:
    """One thread, and a bound on memory, so that one type cannot take the machine with it."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.ERROR)


def work(name: str) -> Row:
    prepare()
    return measure(name)


def quick(name: str) -> Row:
    prepare()
    return measure(name, full=False)


def _describe(row: Row) -> None:
    model, inputs = specimen(row.name)
    row.model = type(model).__name__
    row.inputs = sorted(inputs)
    if row.group == "further":
        row.model = model_class(row.name).__name__


def _fold(row: Row, full: bool) -> None:
    for with_inputs, everything in RUNS if full else RUNS[:2]:
        started = time.process_time()
        try:
            outcome = fold_outcome(row.name, with_inputs=with_inputs, everything=everything)
        except flashnorm.TraceError as error:
            if with_inputs:
                row.category, row.cause = "cannot be recorded", str(error)
            continue
        if with_inputs:
            row.fold_seconds = round(time.process_time() - started, 1)
        row.default_inputs |= not with_inputs
        row.error = max(row.error or 0.0, outcome.error)
        row.noise = max(row.noise or 0.0, outcome.noise)
        if everything:
            _count(row, outcome.plan, ("centering", "scale"))
        elif not row.traced:
            _count(row, outcome.plan, ("kind", "gain", "bias"))
            row.sites, row.unreached = len(outcome.plan.sites), len(outcome.plan.unreached)
            row.reasons = {s.path: s.reason for s in outcome.plan.sites if s.gain_state == "kept"}
        row.traced = True
    if row.traced and not row.sites:
        row.category, row.cause = "has no norm at all", "nothing divides by a statistic of itself"
    if full and row.count("gain", "kept"):
        needed = needed_refusals(row.name)
        row.refused_gains, row.refusals_needed = len(needed), sum(needed.values())
        row.unneeded = [gain for gain, is_needed in needed.items() if not is_needed]


def _count(row: Row, plan, states) -> None:
    for state in states:
        row.states[state] = dict(
            Counter(getattr(site, FIELDS.get(state, state)) for site in plan.sites)
        )
