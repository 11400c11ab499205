"""Norms of a live model replaced by ones that compute less, and put back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from flashnorm.nn import FlashRMSNorm
from flashnorm.plan import Entry, Plan, Site


@dataclass
class Swaps:
    """What was replaced: (owner, attribute, module as it was), and the hooks that were set."""

    modules: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def undo_(self) -> None:
        for owner, attribute, module in self.modules:
            setattr(owner, attribute, module)
        for handle in self.hooks:
            handle.remove()


def swap_norms_(model: nn.Module, plan: Plan) -> Swaps:
    """Put a `FlashRMSNorm` in the place of every centred LayerNorm that is a module of its own.

    Weights must be folded and centred already. A norm without a module of its own goes on
    subtracting a mean, which is zero.
    """
    swaps = Swaps()
    for site in plan.sites:
        if site.centring == "folded" and site.replaceable and site.eps is not None:
            _swap_(model, site, swaps)
    for entry in plan.entries:
        swaps.hooks.append(_hook_(model.get_submodule(entry.path), entry))
    return swaps


def _swap_(model: nn.Module, site: Site, swaps: Swaps) -> None:
    old = model.get_submodule(site.path)
    if isinstance(old, FlashRMSNorm) or not set(_names(old)) <= {"weight", "bias"}:
        return
    if site.weight is not None and site.weight.scale != 1.0:
        return
    new = _norm(old, site).train(old.training)
    for owner in model.modules():
        for attribute, child in list(owner._modules.items()):
            if child is old:
                swaps.modules.append((owner, attribute, old))
                setattr(owner, attribute, new)


def _names(module: nn.Module) -> Sequence[str]:
    return [name for name, held in module._parameters.items() if held is not None]


def _norm(old: nn.Module, site: Site) -> FlashRMSNorm:
    held = {name: old._parameters[name] for name in _names(old)}
    moved = {"weight": site.gain == "folded", "bias": site.bias == "folded"}
    absent = {name: p.detach().clone() for name, p in held.items() if p is not None and moved[name]}
    kept: dict[str, Any] = {name: p for name, p in held.items() if name not in absent}
    offset = site.weight.offset if site.weight is not None and "weight" in kept else 0.0
    assert site.eps is not None
    return FlashRMSNorm(site.width, site.eps, offset=offset, absent=absent, **kept)


def _hook_(module: nn.Module, entry: Entry) -> RemovableHandle:
    if entry.received:
        return module.register_forward_pre_hook(_centre_first)
    return module.register_forward_hook(_centre_output)


def _centre_first(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (remove_mean(given[0]), *given[1:])


def _centre_output(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return remove_mean(output)
    return (remove_mean(output[0]), *output[1:])


def remove_mean(x: Tensor) -> Tensor:
    """E3 for values that no linear layer writes: `x (I − 11ᵀ/n)`, of rank one. x: [.., n].

    This is the one mean that a whole stream of norms still costs.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide - F.linear(wide, wide.new_full((1, x.shape[-1]), 1 / x.shape[-1]))).to(x.dtype)
