"""Example inputs for a transformers model, made from its forward's signature.

Small and generic: token ids, positions and masks where `forward` takes them. A mask that is already
four-dimensional, and explicit positions, keep the model from asking a fake tensor for its value.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS = 2, 6


def example_inputs(model: nn.Module) -> list[dict[str, Any]]:
    """Candidates for a forward of `model`, the one that hides least from a fake trace first."""
    accepted = _accepted(model)
    ids = torch.ones(BATCH, TOKENS, dtype=torch.long)
    positions = torch.arange(TOKENS).expand(BATCH, TOKENS)
    base: dict[str, Any] = {"input_ids": ids, "use_cache": True}
    if "decoder_input_ids" in accepted:
        base["decoder_input_ids"] = ids
    full = {**base, "attention_mask": _causal_mask(TOKENS, TOKENS), "position_ids": positions}
    flat = {**base, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    bare = {**base, "use_cache": False}
    candidates = [full, flat, {**base, "attention_mask": torch.ones_like(ids)}, base, bare]
    kept = [{k: v for k, v in c.items() if k in accepted} for c in candidates]
    dummies = getattr(model, "dummy_inputs", None)
    return [*kept, dict(dummies)] if isinstance(dummies, Mapping) else kept


def decode_inputs(inputs: Any, output: Any, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs for one more token with the cache that `output` holds; nothing without a cache."""
    for name in ("past_key_values", "cache_params", "state"):
        cache = output.get(name) if isinstance(output, Mapping) else None
        if cache is not None and isinstance(inputs, Mapping) and "input_ids" in inputs:
            yield from _steps(inputs, name, cache, output, _accepted(model))
            return


def _steps(
    inputs: Mapping[str, Any],
    name: str,
    cache: Any,
    output: Mapping[str, Any],
    accepted: frozenset[str],
) -> Iterator[dict[str, Any]]:
    one = inputs["input_ids"][:, :1]
    length = inputs["input_ids"].shape[1]
    step: dict[str, Any] = {"input_ids": one, name: cache, "use_cache": True}
    if "decoder_input_ids" in inputs:
        step = {"decoder_input_ids": one, name: cache, "use_cache": True}
        if (encoded := output.get("encoder_last_hidden_state")) is not None:
            step["encoder_outputs"] = (encoded,)
    position = {"position_ids": torch.full_like(one, length)}
    mask = {"attention_mask": _causal_mask(1, length + 1)}
    flat = {"attention_mask": torch.ones(BATCH, length + 1, dtype=torch.long)}
    for extra in ({**position, **mask}, {**position, **flat}, flat, {}):
        yield {k: v for k, v in {**step, **extra}.items() if k in accepted}


def _accepted(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _causal_mask(queries: int, keys: int) -> Tensor:
    """An additive mask, [batch, 1, queries, keys]: the last `queries` positions of `keys`."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((queries, keys), lowest).triu(diagonal=keys - queries + 1)
    return mask.expand(BATCH, 1, queries, keys).contiguous()
