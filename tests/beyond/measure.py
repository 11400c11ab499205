"""Fold and accelerate one specimen and hold it against its original."""

from __future__ import annotations

import copy
import logging
import os
import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import flashnorm
from flashnorm.plan import Plan
from flashnorm.rewrite import apply_plan_
from flashnorm.verification.bounds import Size, output_bound, owns_matrix, width_of
from tests.zoo.fold import relative

from .registry import by_key
from .rows import Row
from .snapshot import Snapshot
from .specimen import Specimen, called, in_dtype, made, nudged, run, truth


def work(key: str) -> Row:
    prepare()
    return measure(by_key(key))


def prepare() -> None:
    """One thread, nothing fetched, and quiet libraries."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)


def measure(specimen: Specimen) -> Row:
    """Build, run, inspect, fold and accelerate; a failure is a row with its cause."""
    row, started = Row(specimen.key, specimen.library), time.process_time()
    try:
        _measure(row, specimen)
    except Exception as error:
        row.category = row.category or "cannot be built"
        row.cause = f"{type(error).__name__}: {error}"
    else:
        row.category = ""
    row.seconds = round(time.process_time() - started, 1)
    return row


def _measure(row: Row, specimen: Specimen) -> None:
    row.category = "cannot be built"
    model, inputs = made(specimen)
    row.model = f"{type(model).__module__.split('.')[0]}.{type(model).__name__}"
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    row.category = "does not run"
    plain = run(model, inputs)
    if not plain or not any(t.numel() and t.isfinite().all() for t in plain):
        raise ValueError("no output is a finite floating tensor")
    expected = truth(model, inputs)
    row.category = "cannot be inspected"
    with torch.no_grad():
        before = Snapshot.of(model)
        flashnorm.inspect(model, copy.deepcopy(inputs))
        row.touched = before.differences(Snapshot.of(model))[:20]
    row.category = "cannot be folded"
    _fold(row, model, inputs, expected)
    row.category = "cannot be accelerated"
    _accelerate(row, model, inputs, plain, expected)


def _fold(row: Row, model: nn.Module, inputs: Any, expected: list[Tensor]) -> None:
    wide, given = copy.deepcopy(model).double(), in_dtype(inputs, torch.float64)
    row.noise = relative(truth(nudged(wide), inputs), expected)
    plan = _folded_(wide, given)
    row.error = relative(truth(wide, inputs), expected)
    row.norms = dict(Counter(site.kind for site in plan.sites))
    row.gains = dict(Counter(site.gain_state for site in plan.sites))
    row.reasons = {site.path: site.reason for site in plan.sites if site.gain_state == "kept"}


def _folded_(model: nn.Module, inputs: Any) -> Plan:
    """Fold; a forward that runs in float32 only is planned in it."""
    torch.manual_seed(0)
    try:
        return flashnorm.folding(flashnorm.fold_(model, copy.deepcopy(inputs)))
    except flashnorm.TraceError:
        narrow = in_dtype(copy.deepcopy(inputs), torch.float32)
        plan = flashnorm.inspect(copy.deepcopy(model).float(), narrow)
        apply_plan_(model, plan)
        return plan


def _accelerate(
    row: Row, model: nn.Module, inputs: Any, plain: list[Tensor], expected: list[Tensor]
) -> None:
    plain = [tensor.double() for tensor in plain]
    row.theirs = relative(plain, expected)
    row.shaken = relative([t.double() for t in run(nudged(model), inputs)], plain)
    depth = sum(owns_matrix(module) for module in model.modules())
    row.bound = output_bound(Size(width_of(model), depth, torch.float32), torch.float32)
    torch.manual_seed(0)
    fast = flashnorm.accelerate_(copy.deepcopy(model), copy.deepcopy(inputs))
    done = flashnorm.acceleration(fast)
    row.fused, row.parts = len(done.fused), len(done.parts)
    row.unfused = dict(Counter(part.reason for part in done.parts if part.reason))
    found = _twice(fast, inputs)
    row.ours = max(relative(each, expected) for each in found)
    row.apart = max(relative(each, plain) for each in found)
    flashnorm.restore_(fast)
    back = [tensor.double() for tensor in run(fast, inputs)]
    row.restored = len(back) == len(plain) and all(map(_same, back, plain))


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, and not a number in the same places."""
    return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(
        one.isnan(), other.isnan()
    )


def _twice(fast: nn.Module, inputs: Any) -> list[list[Tensor]]:
    """The outputs of the first call and of a later one."""
    first = [tensor.double() for tensor in run(fast, inputs)]
    torch.manual_seed(0)
    with torch.no_grad():
        called(fast, copy.deepcopy(inputs))
    return [first, [tensor.double() for tensor in run(fast, inputs)]]
