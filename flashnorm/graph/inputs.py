"""Example inputs for a transformers model, made from its forward's signature.

Small and generic: token ids, positions and masks where `forward` takes them. A mask that is already
four-dimensional, and explicit positions, keep the model from asking a fake tensor for its value.
What a forward wants besides text, or instead of it, comes from `modalities`. Numbers have the
dtype of the model's own: a convolution takes no others.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.graph.modalities import BATCH, TOKENS, combinations

MOST = 60  # candidates with images, sound or series
# The dtypes that a forward computes in; the others are formats of stored weights.
COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Candidates:
    """Inputs for a forward of `model`, the one that hides least from a fake trace first.

    Made one by one, each time anew: an image of the size that a config names takes memory.
    """

    model: nn.Module

    def __iter__(self) -> Iterator[dict[str, Any]]:
        dtypes = _dtypes(self.model)
        for candidate in self._made():
            if _has_numbers(candidate):
                yield from (_cast(candidate, dtype) for dtype in dtypes)
            else:
                yield candidate

    def _made(self) -> Iterator[dict[str, Any]]:
        needed = _required(self.model)
        texts = _texts(self.model)
        yield from (text for text in texts if needed <= text.keys())
        others = islice(_beyond_text(self.model), MOST)
        yield from (other for other in others if needed <= other.keys())
        dummies = getattr(self.model, "dummy_inputs", None)
        if isinstance(dummies, Mapping):
            yield dict(dummies)
        yield from (text for text in texts if not needed <= text.keys())


def _dtypes(model: nn.Module) -> list[torch.dtype]:
    """What numbers may have to be, for the parameters that they meet: the dtype of most first."""
    found: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.dtype in COMPUTED:
            found[parameter.dtype] += parameter.numel()
    return [dtype for dtype, _ in found.most_common()] or [torch.float32]


def _has_numbers(candidate: Mapping[str, Any]) -> bool:
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in candidate.values())


def _cast(candidate: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same inputs with their numbers in `dtype`. What hides a position stays finite."""
    limits = torch.finfo(dtype)

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.double().clamp(limits.min, limits.max).to(dtype)

    return {name: cast(value) for name, value in candidate.items()}


def example_inputs(model: nn.Module) -> Candidates:
    """What to try a forward of `model` with."""
    return Candidates(model)


def _texts(model: nn.Module) -> list[dict[str, Any]]:
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
    texts = [{k: v for k, v in c.items() if k in accepted} for c in candidates]
    texts = [text for text in texts if any(isinstance(v, Tensor) for v in text.values())]
    return [text for text in texts if any(isinstance(v, Tensor) for v in text.values())]


def _beyond_text(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Images, sound and series, with text where the forward takes it and then without."""
    accepted, ids = _accepted(model), torch.ones(BATCH, TOKENS, dtype=torch.long)
    text = {name: ids for name in sorted(accepted) if name.endswith("input_ids")}
    for other in combinations(accepted, _required(model), getattr(model, "config", None)):
        if text:
            yield {**text, **other}
        yield other


def decode_inputs(inputs: Any, output: Any, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs for one more token with the cache that `output` holds; nothing without a cache."""
    for name in ("past_key_values", "cache_params", "state"):
        cache = output.get(name) if isinstance(output, Mapping) else None
        if cache is not None and isinstance(inputs, Mapping) and _tokens(inputs) is not None:
            yield from _steps(inputs, name, cache, output, model)
            return


def _steps(
    inputs: Mapping[str, Any],
    name: str,
    cache: Any,
    output: Mapping[str, Any],
    model: nn.Module,
) -> Iterator[dict[str, Any]]:
    tokens, accepted = _tokens(inputs), _accepted(model)
    assert tokens is not None
    one, length = tokens[:, :1], tokens.shape[1]
    step: dict[str, Any] = {"input_ids": one, name: cache, "use_cache": True}
    if "decoder_input_ids" in inputs:
        step = {"decoder_input_ids": one, name: cache, "use_cache": True}
        if (encoded := output.get("encoder_last_hidden_state")) is not None:
            step["encoder_outputs"] = (encoded,)
    position = {"position_ids": torch.full_like(one, length)}
    mask = {"attention_mask": _causal_mask(1, length + 1, _dtypes(model)[0]).to(one.device)}
    ones = torch.ones(one.shape[0], length + 1, dtype=torch.long, device=one.device)
    flat = {"attention_mask": ones}
    for extra in ({**position, **mask}, {**position, **flat}, flat, {}):
        yield {k: v for k, v in {**step, **extra}.items() if k in accepted}


def _tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """The token ids whose keys and values a cache holds."""
    return inputs.get("decoder_input_ids", inputs.get("input_ids"))


def _accepted(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _required(model: nn.Module) -> frozenset[str]:
    """The arguments that a forward cannot do without."""
    needed = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(p.name for p in needed if p.default is p.empty and p.kind not in kinds)


def _causal_mask(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An additive mask, [batch, 1, queries, keys]: the last `queries` positions of `keys`."""
    lowest = torch.finfo(dtype).min
    mask = torch.full((queries, keys), lowest, dtype=dtype).triu(diagonal=keys - queries + 1)
    return mask.expand(BATCH, 1, queries, keys).contiguous()
