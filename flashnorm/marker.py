"""The marker in the config of a folded model, so that it is never folded twice unnoticed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from flashnorm.errors import CheckpointError
from flashnorm.plan import Plan

Mode = Literal["compat", "strict"]
MARKERS = ("flashnorm", "flashnorm_folded")
ABSENT = "absent"
# By tensor: its shape, its dtype as safetensors names it, and the value at which it says nothing.
Absent = dict[str, tuple[tuple[int, ...], str, float]]


def marker(plan: Plan, mode: Mode, source: str) -> dict[str, Any]:
    """The config entries of a folded model. `source` is reduced to its last part."""
    from flashnorm import __version__

    plain = all((g.offset, g.scale) == (0.0, 1.0) for g in plan.gains())
    return {
        "flashnorm": {
            "version": __version__,
            "mode": mode,
            "folded": sorted(g.parameter for g in plan.gains()),
            "centered": sorted(c.parameter for c in plan.centerings),
            "kept": sorted({s.path for s in plan.sites if s.gain_state == "kept"}),
            "fold_dtype": "float32" if plain else "float64",
            "source": os.path.basename(os.path.normpath(source)),
        },
        "flashnorm_folded": True,
    }


def folded_by(config: Mapping[str, Any]) -> str | None:
    """The config entry that says a model's gains were folded already, here or by another tool."""
    if config.get("flashnorm_folded") or config.get("flashnorm"):
        return "flashnorm_folded"
    if config.get("flash_norm"):
        return "flash_norm"
    if config.get("rms_norm_has_weight") is False:
        return "rms_norm_has_weight"
    return None


def absent_tensors(marked: Mapping[str, Any]) -> Absent | None:
    """What a strict fold says in its marker that it left out; None where it does not say it.

    Raises CheckpointError where that is no map from names to shapes, dtypes and finite numbers.
    """
    if ABSENT not in marked:
        return None
    held = marked[ABSENT]
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{ABSENT} in the marker of config.json is no map of tensors")
    return {str(name): _absent(str(name), value) for name, value in held.items()}


def _absent(name: str, value: Any) -> tuple[tuple[int, ...], str, float]:
    if isinstance(value, (list, tuple)) and len(value) == 3:
        shape, dtype, number = value
        is_number = type(number) in (int, float) and abs(number) < 1e300
        if isinstance(shape, (list, tuple)) and len(shape) <= 8 and isinstance(dtype, str):
            sizes = all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
            if sizes and is_number:
                return tuple(shape), dtype, float(number)
    raise CheckpointError(
        f"{ABSENT} in the marker of config.json has no shape, dtype and finite number for {name}"
    )


def is_strict(config: Mapping[str, Any]) -> bool:
    """Whether a config says that gains were left out of its checkpoint."""
    marked = config.get("flashnorm")
    return isinstance(marked, dict) and marked.get("mode") == "strict"
