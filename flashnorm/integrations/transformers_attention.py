"""Attention of one new token through the interface of transformers; all other attention is sdpa's.

transformers looks an implementation up by the name in a config, and takes any name with "flash" in
it for one of its own flash attentions: hence NAME. With "sdpa" in it, transformers itself checks
that a model supports sdpa.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.transformers_names import (
    attention_function,
    attention_of,
    batching,
    can_replace_attention,
    give_back_,
    sdpa_mask,
)
from flashnorm.functional import fused
from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import Attention
from flashnorm.kernels.exporting import exporting

NAME, BEFORE = "sdpa_decode", "sdpa"

# What models hand on that says nothing about one new token: a window is in the mask already.
WITHOUT_MEANING = frozenset({"position_ids", "cache_position", "use_cache", "sliding_window"})


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q kᵀ + mask) v, as transformers' sdpa, which runs wherever no kernel does.

    query: [B, H, L, D], key and value: [B, Hkv, T, D], attention_mask: [B or 1, 1, L, T] or None;
    returns ([B, L, H, D], None). The kernel takes L = 1 without gradients.
    """
    if query.shape[2] == 1 and dropout == 0.0 and not module.training:
        mask = () if attention_mask is None else (attention_mask,)
        given = (query, key, value, *mask)
        kernel = dispatch.backend_of(query).attention
        if (
            isinstance(kernel, Attention)
            and _plain(given)
            and _known(kernel, module, given, kwargs)
        ):
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            compiling = torch.compiler.is_compiling()
            attend = kernel.attend_in_graph if compiling else kernel.attend
            return attend(query, key, value, scale, attention_mask), None
    more = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    return _sdpa()(module, query, key, value, attention_mask, **more)


def _plain(given: tuple[Tensor, ...]) -> bool:
    """Whether nothing but the values of these tensors matters."""
    if torch.compiler.is_compiling():
        return not (exporting() or torch.is_grad_enabled()) and not fused.wants_torch(given)
    if dispatch.watched(*given) or dispatch.transformed():
        return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in given)


def _known(
    kernel: Attention, module: nn.Module, given: tuple[Tensor, ...], options: dict[str, Any]
) -> bool:
    """Whether the kernel computes what sdpa would for these tensors and options."""
    for name, option in options.items():
        if option is not None and option is not False and name not in WITHOUT_MEANING:
            return False
    heads, groups = given[0].shape[1], given[1].shape[1]
    # sdpa repeats keys and values as often as the module says, not as their shapes do.
    repeats: int | None = module.__dict__.get("num_key_value_groups")
    if repeats is None:
        repeats = 1 if heads == groups else getattr(module, "num_key_value_groups", 1)
    if repeats * groups != heads:
        return False
    if torch.compiler.is_compiling():
        return kernel.why_not_in_graph(*given) is None
    return kernel.why_not(*given) is None


def _sdpa() -> Callable[..., tuple[Tensor, None]]:
    return attention_function(BEFORE)


class UsedAttention:
    """What `restore_attention_` needs. Unpickled, it lets transformers know the name again."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask())
        _allow_batching()

    def __reduce__(self) -> tuple[type[UsedAttention], tuple[()]]:
        return UsedAttention, ()


def use_attention_(model: nn.Module) -> UsedAttention | str:
    """Let a model from transformers attend by the kernel where it can, in place; or say why not.

    The name of its attention implementation changes, in its config and those inside, by
    `set_attn_implementation`; nothing else does, and no file keeps the name. Models that share a
    config object share its attention, which makes no difference but of speed.
    """
    if reason := why_not(model):
        return reason
    used = UsedAttention()
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return used


def _allow_batching() -> None:
    """Let continuous batching (`generate_batch`, `transformers serve`) begin with our attention.

    It knows transformers' own names only. So a model of ours, or one that shares its config with
    one, has its own attention until the manager stops, which then gives back what was before.
    """
    if (mixin := batching()) is None:
        return
    begin = mixin.init_continuous_batching
    if hasattr(begin, "_flashnorm"):
        return

    @wraps(begin)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if attention_of(self.config) != NAME:
            return begin(self, *args, **kwargs)
        self.set_attn_implementation(BEFORE)
        manager = begin(self, *args, **kwargs)
        give_back_(manager, NAME)
        return manager

    init_continuous_batching._flashnorm = True  # type: ignore[attr-defined]
    mixin.init_continuous_batching = init_continuous_batching


def restore_attention_(model: nn.Module, used: UsedAttention) -> None:
    """Undo `use_attention_`, unless the model was given another implementation meanwhile."""
    if attention_of(model.config) == NAME:
        model.set_attn_implementation(BEFORE)  # type: ignore[operator]


def why_not(model: nn.Module) -> str:
    """Why a model has to keep its attention; empty where it may attend by the kernel."""
    if not (transformers := sys.modules.get("transformers")):
        return "the model is not one from transformers"
    if not isinstance(model, transformers.PreTrainedModel):
        return "the model is not one from transformers"
    backend = dispatch.backend_of(*model.parameters())
    if isinstance(backend.attention, str):
        return backend.attention
    if not backend.uses("attention"):
        return "attention by a kernel is turned off"
    available, reason = backend.available(torch.device(backend.device))
    if not available:
        return reason
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel) and (reason := _fixed(part)):
            return reason
    for config in _configs(model.config):
        if (name := attention_of(config)) not in (BEFORE, NAME):
            return f"{type(config).__name__} asks for {name!r} attention, not for {BEFORE!r}"
    for module in sorted({c.__module__ for m in model.modules() for c in type(m).__mro__}):
        if _distinguishes(module):
            return f"{module} may do something else where attention is not named {BEFORE!r}"
    return ""


def _fixed(part: Any) -> str:
    name = type(part).__name__
    if not can_replace_attention(part):
        return f"{name} has no attention that can be replaced"
    if (found := attention_of(part.config)) not in (BEFORE, NAME):
        return f"{name} runs on {found!r} attention, not on {BEFORE!r}"
    return ""


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            yield from _configs(inner)


@cache
def _distinguishes(module: str) -> bool:
    """Whether the code of a model knows sdpa by its name, other than as the default of an argument.

    What is shared by all models was read: it asks for "flash", "flex" and "eager" only.
    """
    root, _, rest = module.partition(".")
    if root in ("torch", "builtins", "flashnorm", "typing", "collections", "abc"):
        return False
    if root == "transformers" and not rest.startswith("models."):
        return False
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return True
    nodes = list(ast.walk(tree))
    defaults = [
        default
        for node in nodes
        if isinstance(node, ast.arguments)
        for default in (*node.defaults, *node.kw_defaults)
    ]
    return len(_names(nodes)) > len(_names(defaults))


def _names(nodes: Sequence[ast.AST | None]) -> list[ast.AST]:
    return [node for node in nodes if isinstance(node, ast.Constant) and node.value == BEFORE]
