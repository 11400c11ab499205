"""flashnorm makes normalization disappear from any PyTorch transformer, exactly.

Source: FlashNorm, arXiv 2407.09577. Importing this package imports neither torch nor transformers;
each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashnorm.errors import CheckpointError, FlashNormError, FoldError, QuantizedError, TraceError
from flashnorm.plan import Consumer, Gain, Plan, Site, Span

if TYPE_CHECKING:
    from flashnorm import functional as functional
    from flashnorm import nn as nn
    from flashnorm.adapters.fold import fold_adapter as fold_adapter
    from flashnorm.checkpoint.fold import fold_checkpoint as fold_checkpoint
    from flashnorm.engines.auto import AutoFlashNormForCausalLM as AutoFlashNormForCausalLM
    from flashnorm.engines.config import FlashNormConfig as FlashNormConfig
    from flashnorm.functional import explain as explain
    from flashnorm.gguf.model import load_gguf as load_gguf
    from flashnorm.inspection import inspect as inspect
    from flashnorm.quantized.plain import dequantize_ as dequantize_
    from flashnorm.rewrite import fold_ as fold_
    from flashnorm.rewrite import folding as folding
    from flashnorm.rewrite import unfold_ as unfold_
    from flashnorm.runtime import accelerate_ as accelerate_
    from flashnorm.runtime import acceleration as acceleration
    from flashnorm.runtime import restore_ as restore_
    from flashnorm.runtime.captured.make import capture_ as capture_
    from flashnorm.runtime.original import original as original
    from flashnorm.runtime.package.options import Package as Package
    from flashnorm.verification import verify as verify
    from flashnorm.verification import verify_weights as verify_weights

__version__ = "0.1.0"

_LAZY = {
    "inspect": "flashnorm.inspection",
    "fold_": "flashnorm.rewrite",
    "unfold_": "flashnorm.rewrite",
    "folding": "flashnorm.rewrite",
    "fold_checkpoint": "flashnorm.checkpoint.fold",
    "fold_adapter": "flashnorm.adapters.fold",
    "accelerate_": "flashnorm.runtime",
    "acceleration": "flashnorm.runtime",
    "restore_": "flashnorm.runtime",
    "capture_": "flashnorm.runtime.captured.make",
    "original": "flashnorm.runtime.original",
    "Package": "flashnorm.runtime.package.options",
    "verify": "flashnorm.verification",
    "verify_weights": "flashnorm.verification",
    "explain": "flashnorm.functional",
    "load_gguf": "flashnorm.gguf.model",
    "dequantize_": "flashnorm.quantized.plain",
    "AutoFlashNormForCausalLM": "flashnorm.engines.auto",
    "FlashNormConfig": "flashnorm.engines.config",
}

# Modules that are names of the package as well: `flashnorm.functional.norm_linear`.
_ROOMS = ("functional", "nn")

__all__ = [
    "CheckpointError",
    "Consumer",
    "FlashNormError",
    "FoldError",
    "Gain",
    "Plan",
    "QuantizedError",
    "Site",
    "Span",
    "TraceError",
    "__version__",
    *_ROOMS,
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"flashnorm.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'flashnorm' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What can be used, whether it was loaded yet or not; what the file itself needs is not."""
    return sorted(__all__)
