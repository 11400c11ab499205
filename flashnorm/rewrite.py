"""Executing a plan on a live model, in place, and undoing it.

Every product is checked before anything is written, so a fold that would overflow leaves the model
as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm import algebra
from flashnorm.errors import FoldError
from flashnorm.inspection import inspect_module
from flashnorm.marker import MARKERS, marker
from flashnorm.plan import Centring, Consumer, Gain, Plan, Shift
from flashnorm.swap import Eps, Swaps, cancel_norms_, centre_norms_, check_cancel

UNDO = "_flashnorm_undo"
CONVERT = "convert the model to bfloat16 or float32 first"


@dataclass(frozen=True)
class Undo:
    """What `unfold_` needs: the plan, the gains and biases as they were, and what a zero gain
    wiped out."""

    plan: Plan
    vectors: dict[str, Tensor]
    means: dict[Centring, Tensor]
    swaps: Swaps
    wiped: dict[tuple[Gain, Consumer], Tensor]
    tied: dict[str, nn.Parameter]


def fold_(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    untie: bool = False,
    centre: bool = False,
    cancel: bool = False,
    eps: Eps = "exact",
) -> Plan:
    """Fold every gain that can be folded exactly into the linear layers that read it, in place.

    E1: `norm(x)·g Wᵀ = norm(x) W*ᵀ`, `W* = W diag(g)`; the gain is left at its identity. A norm's
    bias goes into its readers' biases, `c* = c + W β` (E2), or where one of them has none stays
    with the norm as β/g (E13). Weights keep their dtype (float16, bfloat16, float32 or float64) and
    are rounded once. `example_inputs`
    is a dict or tuple for the model's forward, needed for modules that are not from transformers.
    `untie` gives a tied head a weight of its own, which costs vocab × width elements.

    `centre` also turns LayerNorms into RMSNorms: the writers of what they read lose their mean over
    the features, `V* = V − mean(V)` (E3), and `flashnorm.nn.FlashRMSNorm` takes the norm's place.

    `cancel` also takes the scale out of norms that other norms undo, `RMS(s·v) = RMS(v)` (E7): with
    `eps="exact"` for any epsilon, because the others then divide theirs by s²; with `eps="ignore"`
    they stay as they are, which differs by what their epsilon weighs.

    Returns the plan. Folding again changes nothing. Raises TraceError where the model cannot be
    recorded, FoldError where a product would leave the range of its dtype.
    Source: FlashNorm, arXiv 2407.09577.
    """
    plan = inspect_module(model, example_inputs, untie=untie, centre=centre)
    if eps not in ("exact", "ignore"):
        raise ValueError(f'eps must be "exact" or "ignore", not {eps!r}')
    cancels = cancel and any(site.scale in ("partial", "cancelled") for site in plan.sites)
    if plan.folded or plan.centrings or cancels:
        apply_plan_(model, plan, cancel=cancel, eps=eps)
    return plan


def apply_plan_(model: nn.Module, plan: Plan, *, cancel: bool = False, eps: Eps = "exact") -> None:
    """Execute a plan on the model that it was made for. Raises FoldError as `fold_` does."""
    if UNDO in model.__dict__:
        # The record of the first fold would be lost, and with it the way back.
        raise FoldError("this model was folded already; unfold_ it before another plan is applied")
    parameters = _parameters(model)
    _check(plan, parameters)
    if cancel:
        check_cancel(model, plan)
    tied = _untie_(model, plan, parameters)
    vectors, wiped = _saved(plan, parameters)
    with torch.no_grad():
        _move_biases_(plan, parameters)
        for name, pairs in plan.absorptions().items():
            for gain, consumer in pairs:
                vector = algebra.effective_gain(parameters[gain.parameter], gain)
                vector = vector.to(parameters[name].device)
                algebra.fold_gain_(parameters[name], vector, consumer.axis, consumer.spans)
        for gain in plan.gains():
            algebra.identity_gain_(parameters[gain.parameter], gain)
        means = {c: algebra.centre_(parameters[c.parameter], c.axis) for c in plan.centrings}
    swaps = Swaps()
    centre_norms_(model, plan, swaps)
    if cancel:
        cancel_norms_(model, plan, eps, swaps)
    _mark(model, plan, Undo(plan, vectors, means, swaps, wiped, tied))


def _move_biases_(plan: Plan, parameters: dict[str, nn.Parameter]) -> None:
    """E2 and E13, while weights and gains are still as they were."""
    for name, pairs in plan.bias_absorptions().items():
        algebra.fold_bias_(parameters[name], _added(parameters, parameters[name], pairs))
    for shift in plan.shifts():
        beta = parameters[shift.parameter]
        if shift.folded:
            beta.zero_()
        else:
            gain = algebra.effective_gain(parameters[shift.gain.parameter], shift.gain)
            algebra.carry_bias_(beta, gain.to(beta.device))


def _added(
    parameters: dict[str, nn.Parameter],
    bias: Tensor,
    pairs: Iterable[tuple[Shift, Consumer]],
) -> Tensor:
    """What a bias takes: the sum of `W β` over the norms that its weight reads."""
    total = torch.zeros(bias.shape, dtype=torch.float64, device=bias.device)
    for shift, consumer in pairs:
        weight = parameters[consumer.parameter]
        beta = parameters[shift.parameter].to(weight.device)
        product = algebra.bias_product(weight, beta, consumer.axis, consumer.spans)
        total += product.to(bias.device)
    return total


def unfold_(model: nn.Module) -> None:
    """Undo `fold_`: divide the gains out again, within one rounding of every weight.

    Columns that a zero gain had wiped out are put back from a copy. Raises FoldError if this model
    object was not folded by `fold_`.
    """
    undo: Undo | None = model.__dict__.get(UNDO)
    if undo is None:
        raise FoldError(
            f"this {type(model).__name__} was not folded by flashnorm.fold_ in this process; "
            "load the original checkpoint instead"
        )
    undo.swaps.undo_()
    parameters = _parameters(model)
    with torch.no_grad():
        for centring, mean in undo.means.items():
            algebra.uncentre_(parameters[centring.parameter], mean)
        for name, pairs in undo.plan.absorptions().items():
            for gain, consumer in pairs:
                _unfold_consumer_(parameters[name], gain, consumer, undo)
        for name, value in undo.vectors.items():
            parameters[name].copy_(value)
    for name, parameter in undo.tied.items():
        _assign(model, name, parameter)
    _unmark(model, bool(undo.tied))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _check(plan: Plan, parameters: dict[str, nn.Parameter]) -> None:
    """Raise before anything is touched; warn of numbers that become subnormal."""
    sources = dict(plan.untied)
    lost = 0
    for name, pairs in plan.absorptions().items():
        weight = parameters[sources.get(name, name)].detach()
        if weight.is_meta:
            raise FoldError(f"{name} is on the meta device; load the weights before folding")
        for gain, consumer in pairs:
            vector = algebra.effective_gain(parameters[gain.parameter], gain).to(weight.device)
            lost += algebra.check_fold(
                name, weight, gain.parameter, vector, consumer.axis, consumer.spans
            )
    _check_biases(plan, parameters)
    if lost:
        warnings.warn(algebra.subnormal_warning(lost), stacklevel=3)


def _check_biases(plan: Plan, parameters: dict[str, nn.Parameter]) -> None:
    """Raise where a bias would leave the range of its dtype."""
    for name, pairs in plan.bias_absorptions().items():
        bias = parameters[name].detach()
        if not bool(torch.isfinite((bias + _added(parameters, bias, pairs)).to(bias.dtype)).all()):
            raise FoldError(f"{name}: adding W β to it overflows {bias.dtype}; {CONVERT}")
    for shift in plan.shifts():
        beta = parameters[shift.parameter].detach()
        gain = algebra.effective_gain(parameters[shift.gain.parameter], shift.gain)
        if not shift.folded and not algebra.can_carry(beta, gain.to(beta.device)):
            raise FoldError(
                f"{shift.parameter}: β/g is not finite, because the gain {shift.gain.parameter} is "
                "zero, or next to it, where the bias is not; make the plan from these very weights"
            )


def _saved(
    plan: Plan, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[tuple[Gain, Consumer], Tensor]]:
    names = [gain.parameter for gain in plan.gains()]
    names += [shift.parameter for shift in plan.shifts()] + list(plan.bias_absorptions())
    vectors = {name: parameters[name].detach().clone() for name in names}
    wiped = {}
    for name, pairs in plan.absorptions().items():
        for gain, consumer in pairs:
            columns = _zero_columns(algebra.effective_gain(vectors[gain.parameter], gain), consumer)
            if len(columns):
                index = columns.to(parameters[name].device)
                wiped[gain, consumer] = parameters[name].detach().index_select(consumer.axis, index)
    return vectors, wiped


def _zero_columns(gain: Tensor, consumer: Consumer) -> Tensor:
    found = [
        (gain[s.gain_start : s.gain_start + s.length] == 0).nonzero().flatten() + s.start
        for s in consumer.spans
    ]
    return torch.cat(found)


def _unfold_consumer_(weight: Tensor, gain: Gain, consumer: Consumer, undo: Undo) -> None:
    vector = algebra.effective_gain(undo.vectors[gain.parameter], gain).to(weight.device)
    columns = _zero_columns(vector, consumer)
    safe = torch.where(vector == 0, torch.ones_like(vector), vector)
    algebra.unfold_gain_(weight, safe, consumer.axis, consumer.spans)
    if len(columns):
        weight.index_copy_(consumer.axis, columns, undo.wiped[gain, consumer])


def _untie_(
    model: nn.Module, plan: Plan, parameters: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Give every untied parameter a copy of its own; returns the shared ones by name."""
    before = {}
    for new, old in plan.untied:
        before[new] = parameters[old]
        copy = nn.Parameter(parameters[old].detach().clone(), parameters[old].requires_grad)
        _assign(model, new, copy)
        parameters[new] = copy
    if before:
        _set_tied(model, False)
    return before


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, parameter)


def _set_tied(model: nn.Module, tied: bool) -> None:
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = tied


def _mark(model: nn.Module, plan: Plan, undo: Undo) -> None:
    model.__dict__[UNDO] = undo
    if (config := getattr(model, "config", None)) is not None:
        source = getattr(config, "_name_or_path", "") or type(model).__name__
        for key, value in marker(plan, "compat", source).items():
            setattr(config, key, value)


def _unmark(model: nn.Module, was_tied: bool) -> None:
    del model.__dict__[UNDO]
    config = getattr(model, "config", None)
    for key in MARKERS:
        if config is not None and hasattr(config, key):
            delattr(config, key)
    if was_tied:
        _set_tied(model, True)
