"""What config.json says before a fold, and what it says after one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import flashnorm
from flashnorm.errors import CheckpointError, QuantizedError
from flashnorm.plan import Plan

QUANTIZED_KEYS = ("quantization_config", "compression_config")


def check_not_folded(config: dict[str, Any]) -> None:
    """Raise CheckpointError where this or another tool says that the gains were folded already."""
    for part in _parts(config):
        if part.get("flashnorm_folded") or part.get("flash_norm"):
            key = "flashnorm_folded" if part.get("flashnorm_folded") else "flash_norm"
        elif part.get("rms_norm_has_weight") is False:
            key = "rms_norm_has_weight"
        else:
            continue
        raise CheckpointError(
            f"this checkpoint was folded already: config.json says {key}: "
            f"{json.dumps(part[key])}; fold the original checkpoint instead"
        )


def check_not_quantized(config: dict[str, Any]) -> None:
    """Raise QuantizedError where config.json declares quantized weights.

    A GGUF file that was dequantized still declares `gguf` over plain floating-point tensors; those
    are checked tensor by tensor.
    """
    for part in _parts(config):
        for key in QUANTIZED_KEYS:
            declared = part.get(key)
            if declared and _method(declared) != "gguf":
                raise QuantizedError(
                    f"the weights are quantized: config.json has {key} with method "
                    f"{_method(declared)}; {QUANTIZED_REMEDY}"
                )


QUANTIZED_REMEDY = (
    "a per-input-channel gain does not fit their scales. Dequantize first, or fold before "
    "quantizing; deferral, which needs no fold, still applies"
)


def folded_config(
    config: dict[str, Any], plan: Plan, *, strict: bool, fold_dtype: str, source: str
) -> dict[str, Any]:
    """The config of the folded checkpoint: the source's own keys, then the marker."""
    config = deepcopy(config)
    for part in _parts(config):
        for key in QUANTIZED_KEYS:
            if part.get(key):
                del part[key]  # only a stale "gguf" comes this far, and readers trip over it
    if plan.untied:
        _untie(config)
    config["flashnorm"] = {
        "version": flashnorm.__version__,
        "mode": "strict" if strict else "compat",
        "folded": [gain.parameter for gain in plan.gains()],
        "kept": [site.path for site in plan.sites if site.gain == "kept"],
        "fold_dtype": fold_dtype,
        "source": source,
    }
    config["flashnorm_folded"] = True
    return config


def _untie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = False


def _method(declared: Any) -> str:
    return str(declared.get("quant_method", "unknown")) if isinstance(declared, dict) else "unknown"


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and the configs of its sub-models."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and key not in QUANTIZED_KEYS and isinstance(value, dict):
            yield value
