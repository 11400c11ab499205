"""Executing a plan on a live model, in place.

Every product is checked before anything is written, and whatever fails later, the model is as it
was.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm import algebra
from flashnorm.compat.transformers_names import name_or_path
from flashnorm.deprecated import takes_old_options
from flashnorm.errors import FoldError
from flashnorm.graph.ambient import on_cpu
from flashnorm.graph.offload import why_offloaded
from flashnorm.marker import marker
from flashnorm.plan import Consumer, Epsilon, Gain, NormBias, Plan
from flashnorm.planner import cancelling, inspect_module
from flashnorm.swap import Swaps, cancel_norms_, center_norms_, check_cancel
from flashnorm.transaction import Transaction
from flashnorm.undo import NOTHING, UNDO, ConfigBefore, Model, Undo, witness, zero_columns
from flashnorm.undo import folding as folding
from flashnorm.undo import unfold_ as unfold_
from flashnorm.warning import warn

CONVERT = "convert the model to bfloat16 or float32 first"


@takes_old_options
def fold_(
    model: Model,
    example_inputs: Any = None,
    *,
    untie: bool = False,
    center: bool = False,
    cancel: bool = False,
    epsilon: Epsilon = "exact",
) -> Model:
    """Fold every gain that can be folded exactly into the linear layers that read it, in place.

    E1: `norm(x)·g Wᵀ = norm(x) W*ᵀ`, `W* = W diag(g)`; the gain is left at its identity. A norm's
    bias goes into its readers' biases, `c* = c + W β` (E2), or where one of them has none stays
    with the norm as β/g (E13). Weights keep their dtype (float16, bfloat16, float32 or float64) and
    are rounded once. `example_inputs` is a dict or tuple for the model's forward, or a list of
    several, needed for modules that are not from transformers.
    `untie` gives a tied head a weight of its own, which costs vocab × width elements; the config
    says so, and the state dict fits only a model whose config does.

    `center` also turns LayerNorms into RMSNorms: the writers of what they read lose their mean over
    the features, `V* = V − mean(V)` (E3), and `flashnorm.nn.FlashRMSNorm` takes the norm's place.

    `cancel` also takes the scale out of norms that other norms undo, `RMS(s·v) = RMS(v)` (E7): with
    `epsilon="exact"` for any epsilon, because the others then divide theirs by s²; with
    `epsilon="ignore"` they stay as they are, which differs by what their epsilon weighs.

    Whatever fails meanwhile, Ctrl-C included, the model is as it was, bit for bit. To that end the
    old values of what changes are kept until the end: for a moment the folded weights are in memory
    twice. `fold_checkpoint` folds on disk in the memory of a block.

    Returns the model; `folding` gives the plan that was carried out. Folding again changes nothing.
    Raises TraceError where the model cannot be recorded, FoldError where a product would leave the
    range of its dtype.
    Source: FlashNorm, arXiv 2407.09577.
    """
    plan = inspect_module(model, example_inputs, untie=untie, center=center)
    if epsilon not in ("exact", "ignore"):
        raise ValueError(f'epsilon must be "exact" or "ignore", not {epsilon!r}')
    plan = cancelling(plan, epsilon) if cancel else plan
    if plan.folded or plan.centerings or plan.entries or plan.cancellings:
        return apply_plan_(model, plan)
    if UNDO not in model.__dict__:
        model.__dict__[NOTHING] = plan
    return model


@on_cpu()
def apply_plan_(model: Model, plan: Plan, *, within: Transaction | None = None) -> Model:
    """Execute a plan on the model that it was made for, whole or not at all; returns the model.

    `within` is a transaction of the caller's that it is a part of. Raises FoldError as `fold_`
    does.
    """
    if UNDO in model.__dict__:
        # The record of the first fold would be lost, and with it the way back.
        raise FoldError("this model was folded already; unfold_ it before another plan is applied")
    parameters = _parameters(model)
    _check(model, plan, parameters)
    check_cancel(model, plan)
    with nullcontext(within) if within else Transaction() as change, torch.no_grad():
        tied = _untie_(model, plan, parameters, change)
        vectors, wiped = _saved(plan, parameters)
        _move_biases_(plan, parameters, change)
        _fold_gains_(plan, parameters, change)
        means = {
            c: algebra.center_(change.values(parameters[c.parameter]), c.axis)
            for c in plan.centerings
        }
        swaps = Swaps()
        center_norms_(model, plan, swaps, change)
        cancel_norms_(model, plan, swaps, change)
        after = {name: witness(parameters[name]) for name in _touched(plan)}
        config = _mark_(model, plan, change)
        undo = Undo(plan, vectors, means, swaps, wiped, tied, after, config)
        change.item(model.__dict__, UNDO, undo)
    return model


def _fold_gains_(plan: Plan, parameters: dict[str, nn.Parameter], change: Transaction) -> None:
    """E1, and every gain that was folded at its identity."""
    for name, pairs in plan.absorptions().items():
        for gain, consumer in pairs:
            vector = algebra.effective_gain(parameters[gain.parameter], gain)
            weight = change.values(parameters[name])
            algebra.fold_gain_(weight, vector.to(weight.device), consumer.axis, consumer.spans)
    for gain in plan.gains():
        algebra.identity_gain_(change.values(parameters[gain.parameter]), gain)


def _move_biases_(plan: Plan, parameters: dict[str, nn.Parameter], change: Transaction) -> None:
    """E2 and E13, while weights and gains are still as they were."""
    for name, pairs in plan.bias_absorptions().items():
        bias = change.values(parameters[name])
        algebra.fold_bias_(bias, _added(parameters, bias, pairs))
    for norm_bias in plan.norm_biases():
        beta = change.values(parameters[norm_bias.parameter])
        if norm_bias.folded:
            beta.zero_()
        else:
            gain = algebra.effective_gain(parameters[norm_bias.gain.parameter], norm_bias.gain)
            algebra.carry_bias_(beta, gain.to(beta.device))


def _added(
    parameters: dict[str, nn.Parameter],
    bias: Tensor,
    pairs: Iterable[tuple[NormBias, Consumer]],
) -> Tensor:
    """What a bias takes: the sum of `W β` over the norms that its weight reads."""
    total = torch.zeros(bias.shape, dtype=torch.float64, device=bias.device)
    for norm_bias, consumer in pairs:
        weight = parameters[consumer.parameter]
        beta = parameters[norm_bias.parameter].to(weight.device)
        product = algebra.bias_product(weight, beta, consumer.axis, consumer.spans)
        total += product.to(bias.device)
    return total


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _touched(plan: Plan) -> tuple[str, ...]:
    """Every parameter that a fold writes."""
    names = [gain.parameter for gain in plan.gains()] + list(plan.absorptions())
    names += [b.parameter for b in plan.norm_biases()] + list(plan.bias_absorptions())
    return tuple(dict.fromkeys(names + [c.parameter for c in plan.centerings]))


def _check(model: nn.Module, plan: Plan, parameters: dict[str, nn.Parameter]) -> None:
    """Raise before anything is touched; warn of numbers that become subnormal."""
    sources = dict(plan.untied)
    for name in _touched(plan):
        if why := why_offloaded(model, sources.get(name, name), "fold"):
            raise FoldError(why)
    lost = 0
    for name, pairs in plan.absorptions().items():
        weight = parameters[sources.get(name, name)].detach()
        for gain, consumer in pairs:
            vector = algebra.effective_gain(parameters[gain.parameter], gain).to(weight.device)
            lost += algebra.check_fold(
                name, weight, gain.parameter, vector, consumer.axis, consumer.spans
            )
    _check_biases(plan, parameters)
    if lost:
        warn(algebra.subnormal_warning(lost))


def _check_biases(plan: Plan, parameters: dict[str, nn.Parameter]) -> None:
    """Raise where a bias would leave the range of its dtype."""
    for name, pairs in plan.bias_absorptions().items():
        bias = parameters[name].detach()
        if not bool(torch.isfinite((bias + _added(parameters, bias, pairs)).to(bias.dtype)).all()):
            raise FoldError(f"{name}: adding W β to it overflows {bias.dtype}; {CONVERT}")
    for norm_bias in plan.norm_biases():
        beta = parameters[norm_bias.parameter].detach()
        gain = algebra.effective_gain(parameters[norm_bias.gain.parameter], norm_bias.gain)
        if not norm_bias.folded and not algebra.can_carry(beta, gain.to(beta.device)):
            raise FoldError(
                f"{norm_bias.parameter}: β/g is not finite, because the gain "
                f"{norm_bias.gain.parameter} is zero, or next to it, where the bias is not; make "
                "the plan from these very weights"
            )


def _saved(
    plan: Plan, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[tuple[Gain, Consumer], Tensor]]:
    names = [gain.parameter for gain in plan.gains()]
    names += [b.parameter for b in plan.norm_biases()] + list(plan.bias_absorptions())
    vectors = {name: parameters[name].detach().clone() for name in names}
    wiped = {}
    for name, pairs in plan.absorptions().items():
        for gain, consumer in pairs:
            columns = zero_columns(algebra.effective_gain(vectors[gain.parameter], gain), consumer)
            if len(columns):
                index = columns.to(parameters[name].device)
                wiped[gain, consumer] = parameters[name].detach().index_select(consumer.axis, index)
    return vectors, wiped


def _untie_(
    model: nn.Module, plan: Plan, parameters: dict[str, nn.Parameter], change: Transaction
) -> tuple[tuple[str, str], ...]:
    """Give every untied parameter a copy of its own; returns the names of what was tied."""
    for new, old in plan.untied:
        copy = nn.Parameter(parameters[old].detach().clone(), parameters[old].requires_grad)
        path, _, attribute = new.rpartition(".")
        change.item(model.get_submodule(path)._parameters, attribute, copy)
        parameters[new] = copy
    return plan.untied


def _mark_(model: nn.Module, plan: Plan, change: Transaction) -> tuple[ConfigBefore, ...]:
    """Say in the config that the model is folded, and that its head is not tied if it was.

    Returns what the configs said before. One that takes no attributes is left as it is: the record
    on the model itself still stops a second fold.
    """
    if (config := getattr(model, "config", None)) is None:
        return ()
    source = name_or_path(config) or type(model).__name__
    before = [_write(config, marker(plan, "compat", source), change)]
    for part in (config, getattr(config, "text_config", None)) if plan.untied else ():
        if part is not None and hasattr(part, "tie_word_embeddings"):
            before.append(_write(part, {"tie_word_embeddings": False}, change))
    return tuple(found for found in before if found is not None)


def _write(config: Any, entries: dict[str, Any], change: Transaction) -> ConfigBefore | None:
    held = getattr(config, "__dict__", None)
    if held is None:
        return None
    before = {key: held[key] for key in entries if key in held}
    try:
        for key, value in entries.items():
            change.attribute(config, key, value)
    except Exception:  # frozen, in one of many ways
        return None
    return ConfigBefore(config, tuple(entries), before)
