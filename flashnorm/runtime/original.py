"""`original`: an accelerated model runs its own code for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from flashnorm.compat.transformers_names import attention_of
from flashnorm.errors import FlashNormError
from flashnorm.graph.offload import is_replaced
from flashnorm.integrations.transformers_attention import NAME, restore_attention_
from flashnorm.integrations.transformers_experts import (
    restore_experts_,
    use_experts_,
    uses_experts,
)
from flashnorm.runtime.accelerate import RECORD, acceleration

Model = TypeVar("Model", bound=nn.Module)

# Where a module keeps what is called: its own place, and where wrappers of accelerate keep it.
_PLACES = ("forward", "_old_forward")


@contextmanager
def original(model: Model) -> Iterator[Model]:
    """A context in which an accelerated model is nothing but its own code; yields the model.

    Every module has the forward of its class, attention and experts have their own names, and
    whoever reads the code (an exporter, `torch.jit.script`, a tracer) sees the original's.
    Afterwards, after an error too, the model is accelerated as before. Weights are as they are:
    gains that were folded stay folded. Not for a model that another thread runs meanwhile.

    Raises FlashNormError where the model was not accelerated, or where a forward was wrapped since
    in a way that hides it.
    """
    if RECORD not in model.__dict__:
        raise FlashNormError("this model was not accelerated by accelerate_: it is the original")
    attention = model.__dict__[RECORD].attention
    found = list(_ours(model))
    _check_not_hidden(model)
    attends = not isinstance(attention, str)
    attends = attends and attention_of(model.config) == NAME
    routes = uses_experts(model)
    taken: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, place in found:
            taken.append((module, place, vars(module)[place]))
            _take(module, place)
        if attends:
            restore_attention_(model, attention)
        if routes:
            restore_experts_(model)
        yield model
    finally:
        for module, place, forward in taken:
            vars(module)[place] = forward
        if attends:
            model.set_attn_implementation(NAME)  # type: ignore[operator]
        if routes:
            use_experts_(model)


def _ours(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module that has a forward of `accelerate_`, and where it keeps it."""
    for module in model.modules():
        for place in _PLACES:
            if _is_ours(vars(module).get(place)):
                yield module, place


def _is_ours(forward: Any) -> bool:
    return type(forward).__module__.startswith(f"{__package__}.")


def _check_not_hidden(model: nn.Module) -> None:
    """Raise FlashNormError where a forward of ours may be called by another one."""
    found = acceleration(model)
    for path in {part.path for part in (*found.fused, *found.training) if not part.reason}:
        module = model.get_submodule(path)
        if not any(_is_ours(vars(module).get(place)) for place in _PLACES) and is_replaced(module):
            raise FlashNormError(
                f"the forward of {path or type(module).__name__} was wrapped or replaced since the "
                "model was accelerated: take the wrapper off first"
            )


def _take(module: nn.Module, place: str) -> None:
    if place == "forward":
        del vars(module)[place]
    else:
        vars(module)[place] = MethodType(type(module).forward, module)
