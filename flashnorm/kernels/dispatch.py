"""Which backend runs norm + linear, why, and what to do where only the reference can."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from flashnorm.errors import FlashNormError
from flashnorm.kernels import reference
from flashnorm.kernels.call import Call, check
from flashnorm.kernels.cpu import calls as cpu

GRADIENT = "a gradient is wanted, which the kernels do not have (use torch.no_grad())"
TRANSFORM = (
    "torch.func, forward-mode derivatives, autocast or a TorchFunctionMode want torch's own "
    "operations"
)

_log = logging.getLogger("flashnorm")
_fallbacks: Counter[str] = Counter()
_forbidden = os.environ.get("FLASHNORM_FALLBACK") == "forbid"
_TRACERS = ("torch.fx.", "torch.export.", "torch._export.")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_autocast = torch._C._is_any_autocast_enabled
_functorch = torch._C._functorch.peek_interpreter_stack
_functions = torch._C._len_torch_function_stack


@dataclass(frozen=True)
class Choice:
    """The backend of one call, and on what or which way, or why not a faster one.

    `cpu`, `gpu` (the reason begins with its way: skinny, gemm or matmul) or `reference`.
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
        return _backend(call).run(call)
    fell_back(reason)
    return reference.norm_linear(call)


def explain(call: Call) -> Choice:
    """What would run for these arguments, without running it; with a gradient, its forward."""
    check(call)
    reason = TRANSFORM if transformed() else _backend(call).why_not(call)
    return Choice("reference", reason) if reason is not None else _fast(call)


def _fast(call: Call) -> Choice:
    if (backend := _backend(call)) is cpu:
        return Choice("cpu", cpu.available()[1])
    way = backend.choose(call)
    return Choice("gpu", f"{way.way}: {way.reason}")


def _why_not(call: Call) -> str | None:
    if transformed():
        return TRANSFORM
    return GRADIENT if call.needs_gradient() else _backend(call).why_not(call)


def _backend(call: Call) -> Any:
    """The module with `why_not` and `run` for the device of x."""
    if not call.x.is_cuda:
        return cpu
    from flashnorm.kernels import gpu

    return gpu


def fallbacks() -> dict[str, int]:
    """Why calls in this process ran on the reference, and how many did."""
    return dict(_fallbacks)


@contextmanager
def forbid_fallback(forbid: bool = True) -> Iterator[None]:
    """Raise instead of falling back, in the whole process (also: FLASHNORM_FALLBACK=forbid)."""
    global _forbidden
    before, _forbidden = _forbidden, forbid
    try:
        yield
    finally:
        _forbidden = before


def fell_back(reason: str) -> None:
    """Count a fallback and say the first of its kind; raise where falling back is forbidden."""
    if _forbidden:
        raise FlashNormError(f"norm + linear has to fall back, which is forbidden: {reason}")
    if reason not in _fallbacks:
        _log.info("norm + linear runs on plain torch: %s", reason)
    _fallbacks[reason] += 1


def watched(*tensors: object) -> bool:
    """Whether something must see a call as an operation: a tracer, a mode, a tensor subclass."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, tensors))
    )


def transformed() -> bool:
    """Whether something must see torch's own operations: vmap, jvp, autocast, function modes."""
    return bool(
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or autocasting()
        or overridden()
    )


def overridden() -> bool:
    """Whether a TorchFunctionMode may change what torch's functions do.

    A default device is one, and does not: kernels make their results where x is. Nor do those that
    torch writes graphs with.
    """
    return _functions() > 0 and not all(
        type(mode) is DeviceContext or type(mode).__module__.startswith(_TRACERS)
        for mode in _get_current_function_mode_stack()
    )


def autocasting() -> bool:
    """Whether autocast is on, for any device: one question, where each device's takes longer."""
    return bool(_autocast())


def not_plain(x: object) -> str:
    """Why more than the values of x matters, so that no kernel may be called directly; or ""."""
    # `watched` and `transformed`, written out: this is asked before every call of a kernel.
    if _modes() or _tracing() is not None or type(x) not in _PLAIN:
        return "a tracer, a mode or a tensor subclass watches every operation"
    if not x.is_cpu:  # type: ignore[attr-defined]
        return f"x is on {x.device}, not on the CPU"  # type: ignore[attr-defined]
    if _autocast() or _functorch() is not None or forward_ad._current_level >= 0:
        return TRANSFORM
    if _functions() and overridden():
        return TRANSFORM
    return ""


def same_as_before() -> bool:
    """Whether nothing began since the last call of a kernel that has to see what comes next."""
    return not (_modes() or _autocast() or (_functions() and overridden()))
