"""What config.json says before a fold, and what it says after one."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from flashnorm.errors import CheckpointError, QuantizedError
from flashnorm.marker import ABSENT, Absent, folded_by, marker
from flashnorm.plan import Plan

STRICT_NOTE = (
    "transformers loads it and begins them at what changes nothing. llama.cpp converts it, but "
    "does not load the result; vLLM and SGLang need flashnorm's plugin for it, and refuse it "
    "without: for those fold without strict"
)
QUANTIZED_KEYS = ("quantization_config", "compression_config")


def check_not_folded(config: dict[str, Any]) -> None:
    """Raise CheckpointError where this or another tool says that the gains were folded already."""
    if key := folded_in(config):
        raise CheckpointError(
            f"this checkpoint was folded already, as {key} in config.json says: fold the "
            "original checkpoint instead"
        )


def folded_in(config: dict[str, Any]) -> str | None:
    """The entry of a config, or of a sub-model's, that says that gains were folded already."""
    return next(filter(None, map(folded_by, _parts(config))), None)


def check_not_quantized(config: dict[str, Any]) -> None:
    """Raise QuantizedError where config.json declares quantized weights.

    A GGUF file that was dequantized still declares `gguf` over plain floating-point tensors; those
    are checked tensor by tensor.
    """
    if method := quantization(config):
        raise QuantizedError(
            f"the weights are quantized: config.json declares the method {method}; "
            f"{QUANTIZED_REMEDY}"
        )


def quantization(config: dict[str, Any]) -> str | None:
    """The method by which a config says that its weights are quantized; None if they are plain."""
    for part in _parts(config):
        for key in QUANTIZED_KEYS:
            if (declared := part.get(key)) and _method(declared) != "gguf":
                return _method(declared)
    return None


QUANTIZED_REMEDY = (
    "a per-input-channel gain does not fit their scales. Dequantize first, or fold before "
    "quantizing; deferral, which needs no fold, still applies"
)


def folded_config(
    config: dict[str, Any], plan: Plan, *, absent: Absent | None, fold_dtype: str, source: str
) -> dict[str, Any]:
    """The config of the folded checkpoint: the source's own keys, then the marker.

    `absent` is what a strict fold leaves out; None for a compatible one.
    """
    config = deepcopy(config)
    for part in _parts(config):
        for key in QUANTIZED_KEYS:
            if part.get(key):
                del part[key]  # only a stale "gguf" comes this far, and readers trip over it
    if plan.untied:
        _untie(config)
    mark = marker(plan, "compat" if absent is None else "strict", source)
    mark["flashnorm"]["fold_dtype"] = fold_dtype
    if absent is not None:
        mark["flashnorm"] |= {"left_out": STRICT_NOTE, ABSENT: absent}
    return config | mark


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
