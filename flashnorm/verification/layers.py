"""Where two models part: the outputs of every module path that both have, compared in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import tree_leaves
from flashnorm.verification.bounds import owns_matrix
from flashnorm.verification.choices import Choices
from flashnorm.verification.inputs import Inputs, run
from flashnorm.verification.precision import float64_truth, in_dtype
from flashnorm.verification.report import LayerError


def layer_errors(
    reference: nn.Module, candidate: nn.Module, inputs: Inputs, tolerance: float
) -> tuple[LayerError, ...]:
    """max|Δ| / max|truth| of each comparable module, in the order in which they finish.

    Only modules that hold, themselves or below them, a weight with two or more axes are compared:
    what a norm alone puts out changes rightly when its gain moves on into the next weight. Of a
    module that is called several times the last call counts. The candidate follows the discrete
    choices of the reference where they tie within `tolerance`.
    """
    truths: dict[str, Tensor] = {}
    choices = Choices()
    _record(reference, inputs, truths.__setitem__, choices)
    found: dict[str, float] = {}

    def compare(path: str, value: Tensor) -> None:
        truth = truths.get(path)
        if truth is not None and truth.shape == value.shape:
            found.pop(path, None)
            found[path] = _error(value, truth)

    _record(candidate, inputs, compare, choices.follower(tolerance))
    return tuple(LayerError(path or "the model", error) for path, error in found.items())


def _record(
    model: nn.Module, inputs: Inputs, keep: Callable[[str, Tensor], None], choices: Choices
) -> None:
    with in_dtype(model, torch.float64), float64_truth(choices), _watched(model, keep):
        run(model, inputs)


@contextmanager
def _watched(model: nn.Module, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`keep(path, first floating output)` at the end of each call of a module with a matrix."""
    handles = [
        module.register_forward_hook(_hook(path, keep))
        for path, module in model.named_modules()
        if any(p.ndim >= 2 for p in module.parameters())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(path: str, keep: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                keep(path, leaf.detach().clone())
                return

    return hook


@contextmanager
def counted_matrices(model: nn.Module) -> Iterator[list[int]]:
    """Yields a list whose one element counts the calls of modules that hold a matrix themselves."""
    count = [0]

    def hook(module: nn.Module, args: Any) -> None:
        count[0] += 1

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if owns_matrix(m)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _error(value: Tensor, truth: Tensor) -> float:
    delta, scale = float((value - truth).abs().max()), float(truth.abs().max())
    if delta == 0:
        return 0.0
    return delta / scale if scale != 0 else float("inf")
