"""Norms of a live model replaced by ones that compute less, and put back again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from flashnorm.errors import FoldError
from flashnorm.kernels import norms
from flashnorm.nn import FlashLinkedRMSNorm, FlashRMSNorm, RowScale, ScaleFeatures
from flashnorm.plan import Plan, Site
from flashnorm.transaction import Transaction, uninterrupted

Norm = TypeVar("Norm", bound=FlashRMSNorm)


@dataclass(frozen=True)
class Swap:
    """A module of ours in the place of another: `owner.attribute` was `old` and is `new`."""

    owner: nn.Module
    attribute: str
    old: nn.Module
    new: FlashRMSNorm


@dataclass
class Swaps:
    """What was replaced, and the hooks that were set."""

    modules: list[Swap] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def last(self) -> list[Swap]:
        """The swaps whose new module was not replaced by another one of ours."""
        return list({(id(s.owner), s.attribute): s for s in self.modules}.values())


def swap_back_(swaps: Swaps, change: Transaction) -> None:
    """Put the replaced norms back, with what happened to ours since: moves, and `train()`.

    The hooks stay; their handles remove them.
    """
    for swap in reversed(swaps.modules):
        old, new = swap.old, swap.new
        for name in new.absent:
            held, place = old._parameters[name], getattr(new, f"absent_{name}")
            if held is not None and (held.dtype, held.device) != (place.dtype, place.device):
                change.data(held, held.data.to(place))
        for name, held in new._parameters.items():
            if held is not None:
                change.item(old._parameters, name, held)
        if old.training != new.training:
            change.attribute(old, "training", new.training)
        change.item(swap.owner._modules, swap.attribute, old)


def center_norms_(model: nn.Module, plan: Plan, swaps: Swaps, change: Transaction) -> None:
    """Put a `FlashRMSNorm` in the place of every centered LayerNorm that is a module of its own.

    Weights must be folded and centered already. A norm without a module of its own goes on
    subtracting a mean, which is zero.
    """
    for site in plan.sites:
        if site.centering == "folded" and site.replaceable:
            _swap_(model, site, FlashRMSNorm, swaps, change)
    for entry in plan.entries:
        module = model.get_submodule(entry.path)
        if entry.received:
            _hook_(module, "forward_pre", _center_first, swaps, change)
        else:
            _hook_(module, "forward", _center_output, swaps, change)


def cancel_norms_(model: nn.Module, plan: Plan, swaps: Swaps, change: Transaction) -> None:
    """Take the scale out of every norm that the plan cancels (E7).

    The norms that undo it divide their epsilon by s², which is exact, or are left as they are,
    which is the paper's form.
    """
    norms = _Norms(model, plan, swaps, change)
    modes = {cancelling.path: cancelling.epsilon for cancelling in plan.cancellings}
    for site in plan.sites:
        if site.path not in modes:
            continue
        epsilon = modes[site.path]
        scaled = [reader for reader in site.readers if reader.scaled]
        norm = norms.linked(site.path)
        norm.defers = True
        if epsilon == "ignore" and not scaled:
            continue
        norm.row_scale = RowScale()
        for reader in scaled:
            hook = ScaleFeatures(norm.row_scale, reader.scaled)
            # Before the user's own: they are given what the reader used to return.
            module = model.get_submodule(reader.path)
            _hook_(module, "forward", hook, swaps, change, prepend=True)
        for renorm in site.renorms if epsilon == "exact" else ():
            undoing = norms.linked(renorm.path)
            undoing.undoes, undoing.rows = norm.row_scale, renorm.rows


@dataclass
class _Norms:
    """Every norm is replaced once, even where it undoes one scale and has its own undone."""

    model: nn.Module
    plan: Plan
    swaps: Swaps
    change: Transaction
    made: dict[str, FlashLinkedRMSNorm] = field(default_factory=dict)

    def linked(self, path: str) -> FlashLinkedRMSNorm:
        if path not in self.made:
            site = next(site for site in self.plan.sites if site.path == path)
            norm = _swap_(self.model, site, FlashLinkedRMSNorm, self.swaps, self.change)
            assert norm is not None, f"{path}: check_cancel was not asked"
            self.made[path] = norm
        return self.made[path]


def check_cancel(model: nn.Module, plan: Plan) -> None:
    """Raise FoldError where a norm that has to be replaced cannot be."""
    sites = {site.path: site for site in plan.sites}
    for cancelling in plan.cancellings:
        renorms = sites[cancelling.path].renorms
        for path in (cancelling.path, *(renorm.path for renorm in renorms)):
            if not can_swap(model.get_submodule(path), sites[path]):
                raise FoldError(
                    f"{path} holds other parameters than a weight and a bias, so no norm of "
                    "ours can take its place; fold without cancel"
                )


def _swap_(
    model: nn.Module, site: Site, kind: type[Norm], swaps: Swaps, change: Transaction
) -> Norm | None:
    old = model.get_submodule(site.path)
    if not can_swap(old, site):
        return None
    new = _norm(old, site, kind).train(old.training)
    _share_hooks_(old, new)
    for owner in model.modules():
        for attribute, child in list(owner._modules.items()):
            if child is old:
                swaps.modules.append(Swap(owner, attribute, old, new))
                change.item(owner._modules, attribute, new)
    return new


def _share_hooks_(old: nn.Module, new: nn.Module) -> None:
    """The very dicts, so that hooks go on running and their handles still remove them."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def can_swap(old: nn.Module, site: Site) -> bool:
    """Whether ours can hold what the module holds: the gain as `weight`, the bias as `bias`."""
    has = set(_names(old))
    absent = set(old.absent) if isinstance(old, FlashRMSNorm) else set()  # already one, or zero
    roles = {"weight": site.gain.parameter if site.gain else "", "bias": site.norm_bias}
    used = {name for name, parameter in roles.items() if parameter}
    if not has <= used <= has | absent or site.eps is None:
        return False
    if any(roles[name].rpartition(".")[2] != name for name in used):
        return False
    return site.gain is None or site.gain.scale == 1.0


def _names(module: nn.Module) -> Sequence[str]:
    return [name for name, held in module._parameters.items() if held is not None]


def _norm(old: nn.Module, site: Site, kind: type[Norm]) -> Norm:
    held = {name: old._parameters[name] for name in _names(old)}
    moved = {"weight": site.gain_state == "folded", "bias": site.bias == "folded"}
    absent = {name: p.detach().clone() for name, p in held.items() if p is not None and moved[name]}
    if isinstance(old, FlashRMSNorm):
        absent |= {name: getattr(old, f"absent_{name}") for name in old.absent}
    kept: dict[str, Any] = {name: p for name, p in held.items() if name not in absent}
    offset = site.gain.offset if site.gain is not None and "weight" in kept else 0.0
    assert site.eps is not None
    kept |= {"offset": offset, "contiguous": norms.described(site.kind).centers}
    return kind(site.width, site.eps, absent=absent, **kept)


def _hook_(
    module: nn.Module,
    kind: Literal["forward", "forward_pre"],
    hook: Callable[..., Any],
    swaps: Swaps,
    change: Transaction,
    *,
    prepend: bool = False,
) -> None:
    with uninterrupted():
        handle = getattr(module, f"register_{kind}_hook")(hook, prepend=prepend)
        change.step(handle.remove)
        swaps.hooks.append(handle)


def _center_first(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (remove_mean(given[0]), *given[1:])


def _center_output(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return remove_mean(output)
    return (remove_mean(output[0]), *output[1:])


def remove_mean(x: Tensor) -> Tensor:
    """E3 for values that no linear layer writes: `x (I − 11ᵀ/n)`, of rank one. x: [.., n].

    This is the one mean that a whole stream of norms still costs.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide - F.linear(wide, wide.new_full((1, x.shape[-1]), 1 / x.shape[-1]))).to(x.dtype)
