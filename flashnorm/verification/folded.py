"""The weights of a candidate that this version folded: bit for bit what the fold makes, or wrong.

A bound on outputs in half precision leaves room for a single wrong weight. Where the candidate says
that it is the fold of the reference, there is nothing to leave room for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import flashnorm
from flashnorm.checkpoint.compare import Difference
from flashnorm.checkpoint.source import CONFIG, read_config
from flashnorm.errors import FlashNormError
from flashnorm.verification.report import Weights
from flashnorm.verification.weights import verify_weights
from flashnorm.verification.weights_report import problem

MARKER = "flashnorm."  # what begins with it in config.json
NOT_COMPARED = (
    "the weights were not held against what the fold makes: the candidate says that this version "
    "folded it, but by another plan, or it was changed since; flashnorm verify --quick says how"
)


def is_own_fold(candidate: Any) -> bool:
    """Whether a directory says that this version of flashnorm folded it."""
    if isinstance(candidate, nn.Module):
        return False
    try:
        mark = read_config(Path(candidate).expanduser()).get("flashnorm")
    except FlashNormError:
        return False
    return isinstance(mark, dict) and mark.get("version") == flashnorm.__version__


def may_be_fold(reference: Any, candidate: Any) -> bool:
    """Whether both are directories, and the candidate says that this version folded it."""
    if isinstance(reference, nn.Module) or not Path(reference).expanduser().is_dir():
        return False
    return is_own_fold(candidate)


def compared_weights(
    reference: Any, candidate: Any, told: Callable[[int], None] | None = None
) -> Weights | None:
    """The tensors of a fold against what it makes of the reference.

    None where the candidate is not the fold of the reference by the plan of this version, or was
    converted since: then only outputs say what it computes. `told` is called with the bytes done.
    """
    if not may_be_fold(reference, candidate):
        return None
    try:
        found = verify_weights(reference, candidate, progress=_progress(told))
    except FlashNormError:
        return None
    if any(one.what != "values" for one in found.wrong):
        return None
    if any(one.file == CONFIG and one.problem.startswith(MARKER) for one in found.files):
        return None
    wrong = [one for one in found.wrong if not one.summed]
    if not wrong and found.wrong_count > len(found.wrong):
        return None  # what is not listed may be anything
    exact = found.compared - (len(found.wrong) - len(wrong))
    return Weights(exact, tuple(one.tensor for one in wrong), _first(wrong))


def _first(wrong: list[Difference]) -> str:
    return f"{wrong[0].tensor}: {problem(wrong[0])}" if wrong else ""


def _progress(told: Callable[[int], None] | None) -> Callable[[int, int, str], None] | None:
    return None if told is None else lambda done, total, name: told(done)
