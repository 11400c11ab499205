"""What `fold_` did, and the way back from it, which is checked before it is gone: what was folded
may have changed since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flashnorm import algebra
from flashnorm.errors import FlashNormError, FoldError
from flashnorm.graph.ambient import on_cpu
from flashnorm.graph.offload import is_replaced, why_offloaded
from flashnorm.plan import Centering, Consumer, Gain, Plan
from flashnorm.swap import Swap, Swaps, swap_back_
from flashnorm.transaction import Transaction, uninterrupted

Model = TypeVar("Model", bound=nn.Module)

UNDO = "_flashnorm_undo"
# The plan of a fold that found nothing to do: there is nothing to undo, but it has its reasons.
NOTHING = "_flashnorm_nothing"
ORIGINAL = "load the original checkpoint instead"
# What a model may have been converted to and from since it was folded.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ConfigBefore:
    """The `entries` of a config that a fold wrote, and what those that were there said before."""

    config: Any
    entries: tuple[str, ...]
    before: dict[str, Any]


@dataclass(frozen=True)
class Undo:
    """What `unfold_` needs: the plan, the gains and biases as they were, what a zero gain wiped
    out, (new, old) names of what was tied, and a `witness` of everything the fold wrote."""

    plan: Plan
    vectors: dict[str, Tensor]
    means: dict[Centering, Tensor]
    swaps: Swaps
    wiped: dict[tuple[Gain, Consumer], Tensor]
    tied: tuple[tuple[str, str], ...]
    after: dict[str, Tensor]
    config: tuple[ConfigBefore, ...]


def folding(model: nn.Module) -> Plan:
    """What `fold_` did with this model: the plan that it carried out, until `unfold_` undoes it.

    A plan without a fold says why of every norm. Folding again, which changes nothing, leaves the
    plan of the first time. Copies and pickles of the model keep it; its state dict does not.

    Raises FlashNormError if this model object was not folded by `fold_`.
    """
    undo: Undo | None = model.__dict__.get(UNDO)
    plan: Plan | None = model.__dict__.get(NOTHING) if undo is None else undo.plan
    if plan is None:
        raise FlashNormError(
            f"this {type(model).__name__} was not folded by flashnorm.fold_ in this process: "
            "flashnorm.inspect says what a fold would do"
        )
    return plan


@on_cpu()
def unfold_(model: Model) -> Model:
    """Undo `fold_`: divide the gains out again, within one rounding of every weight.

    Columns that a zero gain had wiped out are put back from a copy. The model may have been moved
    to another device or dtype since. Everything is checked first, and whatever fails later, the
    model stays folded as it was, so that this can be called again. Returns the model.

    Raises FoldError if this model object was not folded by `fold_`, or if what was folded is not
    there any more: weights or gains with other values, parameters or norms that were replaced or
    wrapped, weights that are offloaded.
    """
    undo: Undo | None = model.__dict__.get(UNDO)
    if undo is None:
        raise FoldError(
            f"this {type(model).__name__} was not folded by flashnorm.fold_ in this process; "
            f"{ORIGINAL}"
        )
    _check(model, undo)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with Transaction() as change, torch.no_grad():
        _unfold_values_(undo, parameters, change)
        for new, old in undo.tied:
            path, _, attribute = new.rpartition(".")
            change.item(model.get_submodule(path)._parameters, attribute, parameters[old])
        swap_back_(undo.swaps, change)
        restored = dict(model.named_parameters(remove_duplicate=False))
        for name, value in undo.vectors.items():
            change.values(restored[name]).copy_(value)
        with uninterrupted():  # nothing fails from here on
            for handle in undo.swaps.hooks:
                handle.remove()
            for entry in undo.config:
                _restore_config(entry)
            del model.__dict__[UNDO]
            model.__dict__.pop(NOTHING, None)
    return model


def _unfold_values_(undo: Undo, parameters: dict[str, nn.Parameter], change: Transaction) -> None:
    dropped = {new for new, _ in undo.tied}
    for centering, mean in undo.means.items():
        if centering.parameter in dropped:
            continue
        weight = change.values(parameters[centering.parameter])
        algebra.uncenter_(weight, mean.to(weight.device))
    for name, pairs in undo.plan.absorptions().items():
        for gain, consumer in () if name in dropped else pairs:
            _unfold_consumer_(change.values(parameters[name]), gain, consumer, undo)


def _unfold_consumer_(weight: Tensor, gain: Gain, consumer: Consumer, undo: Undo) -> None:
    vector = algebra.effective_gain(undo.vectors[gain.parameter], gain).to(weight.device)
    columns = zero_columns(vector, consumer)
    safe = torch.where(vector == 0, torch.ones_like(vector), vector)
    algebra.unfold_gain_(weight, safe, consumer.axis, consumer.spans)
    if len(columns):
        weight.index_copy_(consumer.axis, columns, undo.wiped[gain, consumer].to(weight))


def zero_columns(gain: Tensor, consumer: Consumer) -> Tensor:
    """The positions along the consumer's axis that a gain of zero wipes out."""
    found = [
        (gain[s.gain_start : s.gain_start + s.length] == 0).nonzero().flatten() + s.start
        for s in consumer.spans
    ]
    return torch.cat(found)


def witness(value: Tensor) -> Tensor:
    """A copy of one element of every row and of every column, which tells whether it changed.

    value: [.., n], a row being what has n elements; of a vector everything is copied.
    """
    value = value.detach()
    if value.ndim < 2 or not value.numel():
        return value.clone().reshape(-1)
    n = value.shape[-1]
    rows = value.numel() // n
    place = torch.arange(max(rows, n), device=value.device)
    return value[torch.unravel_index(place % rows * n + place % n, value.shape)]


def _check(model: nn.Module, undo: Undo) -> None:
    """Raise FoldError unless everything that the fold wrote is as it left it."""
    for module in model.modules():
        if type(vars(module).get("forward")).__module__.startswith("flashnorm."):
            raise FoldError("this model is accelerated, with its gains folded: restore_ it first")
    for swap in undo.swaps.last():
        _check_swap(swap)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in [*undo.after, *(name for pair in undo.tied for name in pair)]:
        if name not in parameters and not _is_swapped(model, name, undo):
            raise FoldError(
                f"{name} is no parameter of the model any more (wrapped, replaced or removed): put "
                f"it back, or {ORIGINAL}"
            )
    for name, before in undo.after.items():
        if name in parameters:
            _check_value(model, name, parameters[name], before)


def _is_swapped(model: nn.Module, name: str, undo: Undo) -> bool:
    """Whether a norm of ours stands where this parameter was, without it."""
    path, _, attribute = name.rpartition(".")
    return any(
        attribute in swap.new.absent and swap.new is _submodule(model, path)
        for swap in undo.swaps.last()
    )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _check_swap(swap: Swap) -> None:
    if swap.owner._modules.get(swap.attribute) is not swap.new:
        raise FoldError(
            f"the norm {swap.attribute} that fold_ put into a {type(swap.owner).__name__} was "
            f"replaced or wrapped since: put it back, or {ORIGINAL}"
        )
    if is_replaced(swap.new):  # hooks are the old norm's as well
        raise FoldError(
            f"the norm {swap.attribute} of a {type(swap.owner).__name__} was given another forward "
            "since the fold, which would be lost with it: remove it first"
        )


def _check_value(model: nn.Module, name: str, value: Tensor, before: Tensor) -> None:
    if why := why_offloaded(model, name, "unfold"):
        raise FoldError(why)
    if value.dtype not in DTYPES:
        raise FoldError(f"{name} is {value.dtype} now, so no gain can be divided out; {ORIGINAL}")
    found = witness(value)
    if not _same(found.to(before.device), before):
        raise FoldError(
            f"{name} has other values or another shape than fold_ left (trained, loaded or edited "
            f"since?), so that dividing its gain out would not give the original; {ORIGINAL}"
        )


def _same(found: Tensor, before: Tensor) -> bool:
    """Whether these are the same numbers, up to a conversion of the model and back."""
    if found.shape != before.shape:
        return False
    for dtype in (found.dtype, *DTYPES):
        if torch.allclose(found, before.to(dtype).to(found.dtype), rtol=0, atol=0, equal_nan=True):
            return True
    return False


def _restore_config(entry: ConfigBefore) -> None:
    held = vars(entry.config)
    for key in entry.entries:
        if key in entry.before:
            held[key] = entry.before[key]
        else:
            held.pop(key, None)
