"""The registry of backends: which runs a call, why, and what to do where only the reference can.

The one that was registered last is asked first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashnorm.compat.torch_names import (
    DeviceContext,
    autocast_active,
    count_dispatch_modes,
    count_function_modes,
    forward_ad,
    function_modes,
    functorch_interpreter,
    tracing_state,
)
from flashnorm.errors import FlashNormError
from flashnorm.kernels import reference
from flashnorm.kernels.backend import Backend
from flashnorm.kernels.call import Call, check
from flashnorm.kernels.cpu.backend import CPU
from flashnorm.kernels.fallback import fallbacks, fell_back, forbid_fallback
from flashnorm.kernels.gpu.backend import GPU

__all__ = [
    "Choice",
    "backend_of",
    "explain",
    "fallbacks",
    "fell_back",
    "find",
    "forbid_fallback",
    "norm_linear",
    "register",
    "unregister",
]

GRADIENT = "a gradient is wanted, which the kernels do not have (use torch.no_grad())"
TRANSFORM = (
    "torch.func, forward-mode derivatives, autocast or a TorchFunctionMode want torch's own "
    "operations"
)

_backends: list[Backend] = [CPU, GPU]
_TRACERS = ("torch.fx.", "torch.export.", "torch._export.")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


@dataclass(frozen=True)
class Choice:
    """The backend of one call, and on what or which way, or why not a faster one.

    The name of a backend (of `gpu` the reason begins with its way: skinny, gemm or matmul), or
    `reference`.
    """

    backend: str
    reason: str


def norm_linear(call: Call) -> list[Tensor]:
    """`reference.norm_linear` on the fastest backend that takes the call.

    Raises FlashNormError where none does and falling back is forbidden, ValueError for shapes that
    do not fit each other.
    """
    check(call)
    reason = _why_not(call)
    if reason is None:
        return backend_of(call.x).run(call)
    fell_back(reason)
    return reference.norm_linear(call)


def explain(call: Call) -> Choice:
    """What would run for these arguments, without running it; with a gradient, its forward."""
    check(call)
    backend = backend_of(call.x)
    reason = TRANSFORM if transformed() else backend.why_not(call)
    if reason is not None:
        return Choice("reference", reason)
    return Choice(backend.name, backend.explain(call))


def _why_not(call: Call) -> str | None:
    if transformed():
        return TRANSFORM
    return GRADIENT if call.needs_gradient() else backend_of(call.x).why_not(call)


def backend_of(*tensors: Tensor) -> Backend:
    """The backend that claims any of these; where none does the CPU's, which says why not."""
    for backend in reversed(_backends):
        for x in tensors:
            if backend.claims(x):
                return backend
    return _backends[0]


def find(name: str) -> Backend:
    """The backend of this name. Raises FlashNormError where there is none in this process."""
    for backend in _backends:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in _backends)
    raise FlashNormError(f"there is no backend {name!r} in this process; it has {known}")


def register(backend: Backend) -> None:
    """Let a backend run all that it claims. Raises FlashNormError where one has its name."""
    if any(backend.name == other.name for other in _backends):
        raise FlashNormError(f"there is a backend {backend.name!r} already")
    _backends.append(backend)


def unregister(backend: Backend) -> None:
    """Undo `register`; models that were accelerated on it fail from then on."""
    _backends.remove(backend)


def watched(*tensors: object) -> bool:
    """Whether something must see a call as an operation: a tracer, a mode, a tensor subclass."""
    return bool(
        count_dispatch_modes()
        or tracing_state() is not None
        or not _PLAIN.issuperset(map(type, tensors))
    )


def transformed() -> bool:
    """Whether something must see torch's own operations: vmap, jvp, autocast, function modes."""
    return bool(
        functorch_interpreter() is not None
        or forward_ad._current_level >= 0
        or autocasting()
        or overridden()
    )


def overridden() -> bool:
    """Whether a TorchFunctionMode may change what torch's functions do.

    A default device is one, and does not: kernels make their results where x is. Nor do those that
    torch writes graphs with.
    """
    return count_function_modes() > 0 and not all(
        type(mode) is DeviceContext or type(mode).__module__.startswith(_TRACERS)
        for mode in function_modes()
    )


def autocasting() -> bool:
    """Whether autocast is on, for any device: one question, where each device's takes longer."""
    return bool(autocast_active())


def not_plain(x: object, backend: Backend) -> str:
    """Why more than the values of x matters, so that no kernel may be called directly; or ""."""
    # `watched` and `transformed`, written out: this is asked before every call of a kernel.
    if count_dispatch_modes() or tracing_state() is not None or type(x) not in _PLAIN:
        return "a tracer, a mode or a tensor subclass watches every operation"
    if not backend.claims(x):  # type: ignore[arg-type]
        return backend.elsewhere(x)  # type: ignore[arg-type]
    if autocast_active() or functorch_interpreter() is not None or forward_ad._current_level >= 0:
        return TRANSFORM
    if count_function_modes() and overridden():
        return TRANSFORM
    return ""


def same_as_before() -> bool:
    """Whether nothing began since the last call of a kernel that has to see what comes next."""
    return not (
        count_dispatch_modes() or autocast_active() or (count_function_modes() and overridden())
    )
