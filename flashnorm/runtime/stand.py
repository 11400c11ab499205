"""An object in the place of a module's forward."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from flashnorm.errors import FlashNormError


class NoSource(FlashNormError, AttributeError):
    """Somebody compiles the source of a forward that has none (torch.jit.script)."""


class Stand:
    """What is called as `module.forward`; by its signature it is the one that it stands for."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(type(self.module).forward, self.module)

    @property
    def __globals__(self) -> dict[str, Any]:
        raise NoSource(
            f"the forward of this {type(self.module).__name__} runs on kernels, which have no "
            "source to script: call flashnorm.restore_(model) first, or use torch.jit.trace"
        )


class Retired(Stand):
    """A forward that was taken away, for those who still hold it: the module's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = self.__dict__.get("held")
        if held is not None and held.own is not None:
            return held.own(self.module, *args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def retire(forward: Stand) -> None:
    """From now on a forward is nothing but that of its module's class."""
    forward.__class__ = Retired
