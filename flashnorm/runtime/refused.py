"""Why a module keeps its own forward, by what it is itself."""

from __future__ import annotations

from torch import Tensor, nn

from flashnorm.kernels.backend import has_memory
from flashnorm.quantized.layout import Held

REPLACED = "its forward has been replaced on the module itself"
SUBCLASS = "its {} is a {}, not a plain tensor with memory"


class Refused(Exception):
    """A module keeps its own forward; the text says why."""


def check(module: nn.Module, held: Held | None = None) -> None:
    """Raise Refused where a module's forward or tensors are of a kind that has to run itself.

    `held` says how it holds a packed weight, whose tensors are what a layout has looked at.
    """
    if "forward" in module.__dict__ and not _is_own(module, held):
        raise Refused(REPLACED)
    if held is not None:
        return
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and not has_memory(tensor):
                raise Refused(SUBCLASS.format(name, _kind(tensor)))


def _is_own(module: nn.Module, held: Held | None) -> bool:
    """Whether the forward on a module is that of who packed its weight."""
    known = None if held is None else held.forward
    return known is not None and known(module.__dict__["forward"])


def _kind(tensor: Tensor) -> str:
    kind = type(tensor).__name__
    return f"{kind} on {tensor.device}" if tensor.is_meta else kind
