"""Experts of few tokens through the interface of transformers; all others as the model had it.

    y_t = Σ_j r_tj · W2_e gate(W1_e x_t),   e = chosen[t, j]

Of W1 [E, 2m, n] and W2 [E, n, m] only the chosen experts are read, once. transformers looks an
implementation up by the name in a config; there is one of ours for each that we stand for, so that
it is known what runs wherever no kernel does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.transformers_names import (
    ExpertWeights,
    expert_weights,
    experts_function,
    experts_of,
    has_experts,
    register_experts,
    set_experts_,
)
from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import Backend, Experts, has_memory

# What we stand for, by our names: products of the weights that we read, in their order.
BEFORE = {f"{name}_decode_cpu": name for name in ("grouped_mm", "batched_mm")}
OURS = {before: name for name, before in BEFORE.items()}

SHAPES = "the experts' weights do not fit each other, x, or what was chosen"
NO_EXPERT = "an expert was chosen that there is not"
GATE = "the gate of the experts returned another shape than the next product takes"
SUBCLASS = "the weights of its experts are of a tensor subclass, or have no memory"


def experts(before: str, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What the implementation `before` computes; by kernels for few tokens without a gradient.

    x: [T, n], chosen: [T, K] numbers of experts, r: [T, K]; returns [T, n] in the dtype of x. Each
    product is rounded once, from sums in float32 with their bias; the gate is the module's, and r
    and the sum over j are torch's own operations, as in batched_mm.
    """
    if len(args) == 3 and not kwargs and not torch.compiler.is_compiling():
        found = _by_kernels(module, *args)
        if found is not None:
            return found
    y: Tensor = experts_function(before)(module, *args, **kwargs)
    return y


def _by_kernels(module: nn.Module, x: Any, chosen: Any, r: Any) -> Tensor | None:
    """The result on kernels; None where they do not fit."""
    if not isinstance(x, Tensor) or x.dim() != 2:
        return None
    backend = dispatch.backend_of(x)
    kernel = backend.experts
    if isinstance(kernel, str) or len(x) > kernel.most:
        return None  # what was before is faster, or there is nothing else
    weights = expert_weights(module)
    reason = weights if isinstance(weights, str) else _why_not(backend, weights, x, chosen, r)
    if not reason:
        assert not isinstance(weights, str)
        found = _few(kernel, weights, x, chosen, r)
        if isinstance(found, Tensor):
            return found
        reason = found
    dispatch.fell_back(reason)
    return None


def _why_not(backend: Backend, weights: ExpertWeights, x: Tensor, chosen: Any, r: Any) -> str:
    """Why the implementation of before has to run; empty where the kernels may."""
    first, first_bias, second, second_bias, _ = weights
    given = [t for t in weights[:4] if t is not None]
    if reason := dispatch.not_plain(x, backend):
        return reason
    if dispatch.watched(chosen, r, *given):
        return SUBCLASS
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, r, *given)):
        return dispatch.GRADIENT
    if not _fit(first, second, x, chosen, r):
        return SHAPES
    kernel = backend.experts
    assert isinstance(kernel, Experts)
    hidden = x.new_empty((1, second.shape[2]))
    found = kernel.why_not(x, first, first_bias) or kernel.why_not(hidden, second, second_bias)
    return found or ""


def _fit(first: Tensor, second: Tensor, x: Tensor, chosen: Tensor, r: Tensor) -> bool:
    if not x.dim() == chosen.dim() == r.dim() == 2 or not first.dim() == second.dim() == 3:
        return False
    if chosen.shape != r.shape or len(chosen) != len(x) or not chosen.numel():
        return False
    return chosen.dtype in (torch.int64, torch.int32) and len(first) == len(second)


def _few(
    kernel: Experts, weights: ExpertWeights, x: Tensor, chosen: Tensor, r: Tensor
) -> Tensor | str:
    """Expert by expert, all their tokens together; or why that is not possible."""
    first, first_bias, second, second_bias, gate = weights
    tokens, each = chosen.shape
    ids = chosen.reshape(-1).tolist()
    if min(ids) < 0 or max(ids) >= len(first):
        return NO_EXPERT
    if tokens == 1:
        order, groups, rows = None, [(e, 1) for e in ids], x
    else:
        order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__), device=x.device)
        groups, rows = _groups(sorted(ids)), x[order // each]
    hidden = gate(kernel.multiply(rows, first, first_bias, groups))
    if hidden.shape != (len(ids), second.shape[2]) or hidden.dtype != x.dtype:
        return GATE
    y = kernel.multiply(hidden, second, second_bias, groups)
    if order is not None:
        y = torch.empty_like(y).index_copy_(0, order, y)
    weighted = y * r.reshape(-1, 1)
    return weighted.view(tokens, each, -1).sum(1).to(x.dtype)


def _groups(ids: Sequence[int]) -> list[tuple[int, int]]:
    return [(e, len(list(same))) for e, same in groupby(ids)]


class UsedExperts:
    """What `restore_experts_` needs. Unpickled, it lets transformers know the names again."""

    def __init__(self) -> None:
        for name, before in BEFORE.items():
            register_experts(name, partial(experts, before))

    def __reduce__(self) -> tuple[type[UsedExperts], tuple[()]]:
        return UsedExperts, ()


def use_experts_(model: nn.Module) -> UsedExperts | str | None:
    """Let the experts of a model from transformers run on kernels where they can, in place.

    None where a model has no experts, or why they stay as they are. The name of the implementation
    changes in the configs that the experts look it up in, and nothing else; no file keeps it.
    """
    found = list(_modules(model))
    if not found:
        return None
    if reason := why_not(model):
        return reason
    used = UsedExperts()
    for module in found:
        name = experts_of(module.config)
        if name in OURS:
            set_experts_(module.config, OURS[name])
    return used


def restore_experts_(model: nn.Module) -> None:
    """Undo `use_experts_`, but where a config was given another implementation meanwhile."""
    for module in _modules(model):
        name = experts_of(module.config)
        if name in BEFORE:
            set_experts_(module.config, BEFORE[name])


def uses_experts(model: nn.Module) -> bool:
    """Whether any experts of a model ask for ours."""
    return any(experts_of(module.config) in BEFORE for module in _modules(model))


def _modules(model: nn.Module) -> Iterator[Any]:
    if "transformers" in sys.modules:
        yield from (module for module in model.modules() if has_experts(module))


def why_not(model: nn.Module) -> str:
    """Why the experts of a model have to stay as they are; empty where they may use kernels."""
    backend = dispatch.backend_of(*model.parameters())
    if isinstance(backend.experts, str):
        return backend.experts
    available, reason = backend.available(torch.device(backend.device))
    if not available:
        return reason
    for module in _modules(model):
        name, kind = experts_of(module.config), type(module).__name__
        if name not in OURS and name not in BEFORE:
            known = " or ".join(OURS)
            return f"{kind} asks for {name!r} experts, not for {known}"
        weights = expert_weights(module)
        if isinstance(weights, str):
            return f"{kind}: {weights}"
        for weight in weights[:4]:
            if weight is None:
                continue
            if not has_memory(weight):
                return f"{kind}: {SUBCLASS}"
            if weight.dtype not in backend.limits.dtypes:
                return f"{kind}: its experts are {weight.dtype}"
    return ""
