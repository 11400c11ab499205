"""`original`: an accelerated model runs its own code for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from flashnorm.errors import FlashNormError
from flashnorm.runtime.accelerate import RECORD
from flashnorm.runtime.attention import NAME, restore_attention_

Model = TypeVar("Model", bound=nn.Module)

# Where a module keeps what is called: its own place, and where wrappers of accelerate keep it.
_PLACES = ("forward", "_old_forward")


@contextmanager
def original(model: Model) -> Iterator[Model]:
    """A context in which an accelerated model is nothing but its own code; yields the model.

    Every module has the forward of its class, attention has its own name, and whoever reads the
    code (an exporter, `torch.jit.script`, a tracer) sees the original's. Afterwards, after an error
    too, the model is accelerated as before. Weights are as they are: gains that were folded stay
    folded. Not for a model that another thread runs meanwhile.

    Raises FlashNormError where the model was not accelerated, or where a forward was wrapped since
    in a way that hides it.
    """
    if RECORD not in model.__dict__:
        raise FlashNormError("this model was not accelerated by accelerate_: it is the original")
    undo = model.__dict__[RECORD]
    found = [_place(module) for module in undo.modules]
    attends = not isinstance(undo.attention, str)
    attends = attends and model.config._attn_implementation == NAME  # type: ignore[union-attr]
    taken: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, place in found:
            taken.append((module, place, vars(module)[place]))
            _take(module, place)
        if attends:
            restore_attention_(model, undo.attention)
        yield model
    finally:
        for module, place, forward in taken:
            vars(module)[place] = forward
        if attends:
            model.set_attn_implementation(NAME)  # type: ignore[operator]


def _place(module: nn.Module) -> tuple[nn.Module, str]:
    """Where a module keeps the forward that `accelerate_` gave it."""
    for place in _PLACES:
        if type(vars(module).get(place)).__module__.startswith(f"{__package__}."):
            return module, place
    raise FlashNormError(
        f"the forward of a {type(module).__name__} was wrapped or replaced since the model was "
        "accelerated: take the wrapper off first"
    )


def _take(module: nn.Module, place: str) -> None:
    if place == "forward":
        del vars(module)[place]
    else:
        vars(module)[place] = MethodType(type(module).forward, module)
