"""What a model is called with for one more token, and why a package cannot take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OTHER = "an argument that the package does not take: {}"
MASK = "a mask that hides more, or less, than positions of the cache"
PLACES = "position ids that are not [batch, 1]"

# What may be said beside the tensors: by name, the values that mean what the package does.
_MEANT: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True),
    "return_dict": (None, True),
    "logits_to_keep": (None, 0, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
_TENSORS = {"input_ids", "attention_mask", "position_ids", "past_key_values"}


@dataclass(frozen=True)
class Given:
    """The arguments of one step, as the model is given them."""

    ids: Tensor
    mask: Any
    positions: Tensor | None
    cache: Any


def read(args: tuple[Any, ...], options: Mapping[str, Any]) -> Given | str | None:
    """The arguments of a step, why they are not what a package takes, or None for other calls."""
    ids = args[0] if args else options.get("input_ids")
    cache = options.get("past_key_values")
    if cache is None or type(ids) is not Tensor or ids.dim() != 2 or ids.shape[1] != 1:
        return None
    if len(args) > 1 or (args and "input_ids" in options):
        return OTHER.format("more than one by position")
    for name, value in options.items():
        if name in _TENSORS:
            continue
        if not any(value is meant for meant in _MEANT.get(name, (None,))):
            return OTHER.format(name)
    return Given(ids, options.get("attention_mask"), options.get("position_ids"), cache)


class Masks:
    """Which positions of a cache are seen, as [batch, length] of bool; the step hides later ones.

    A mask of another form is one, where it says of each position up to the new token whether it is
    seen, and of all later ones that they are not.
    """

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self.all = torch.ones(batch, length, dtype=torch.bool)

    def of(self, mask: Any, used: int, fixed: bool) -> Tensor | str:
        """The mask for a new token after `used` ones, or why there is none."""
        if isinstance(mask, dict):
            if set(mask) != {"full_attention"}:
                return MASK
            mask = mask["full_attention"]
        if mask is None:
            return self.all
        if type(mask) is not Tensor or not mask.is_cpu:
            return MASK
        if mask.dim() == 2:
            return self._flat(mask, used)
        return self._square(mask, used) if fixed else MASK

    def _flat(self, mask: Tensor, used: int) -> Tensor | str:
        if mask.shape != (self.batch, used + 1) or mask.is_floating_point():
            return MASK
        found = self.all.clone()
        found[:, : used + 1] = mask
        return found

    def _square(self, mask: Tensor, used: int) -> Tensor | str:
        """A mask that was made for the whole cache: [batch, 1, 1, length] of bool."""
        shape = (self.batch, 1, 1, self.length)
        if mask.shape != shape or mask.dtype != torch.bool:
            return MASK
        if used + 1 < self.length and bool(mask[..., used + 1 :].any()):
            return MASK
        return mask.reshape(self.batch, self.length)
