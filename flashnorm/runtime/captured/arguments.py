"""The tensors that a model is given for one more token, of which a graph has its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashnorm.runtime.package.arguments import Given

GROWS = "a mask [batch, tokens] grows with every token; give none, or generate() a static cache"
OTHER = "{} is not a plain tensor on the model's device"

Options = tuple[tuple[str, object], ...]


def tensors(given: Given, device: torch.device) -> dict[str, Tensor] | str:
    """Every tensor that the model is given, by name, or why they are not those of a graph."""
    found = {"input_ids": given.ids}
    if given.positions is not None:
        found["position_ids"] = given.positions
    masks = given.mask if isinstance(given.mask, dict) else {"": given.mask}
    for name, mask in masks.items():
        if mask is not None:
            found[f"attention_mask.{name}"] = mask
    for name, tensor in found.items():
        if type(tensor) is not Tensor or tensor.device != device:
            return OTHER.format(name)
        if name.startswith("attention_mask") and tensor.dim() == 2:
            return GROWS
    return found


def form(tensors: Mapping[str, Tensor]) -> tuple[object, ...]:
    """What two sets of arguments have in common that one graph takes."""
    return tuple((name, t.shape, t.dtype) for name, t in tensors.items())


def options(kwargs: Mapping[str, Any], mask: Any) -> Options:
    """The other arguments, by value: names of masks, and flags."""
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
    plain = tuple((name, value) for name, value in kwargs.items() if name not in names)
    masks = tuple((n, m is None) for n, m in mask.items()) if isinstance(mask, dict) else None
    return (*plain, ("masks", masks))


def with_own(
    own: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with a graph's own tensors in the place of those that were given."""
    ids, named = own["input_ids"], dict(kwargs)
    if "position_ids" in own:
        named["position_ids"] = own["position_ids"]
    mask = named.get("attention_mask")
    if isinstance(mask, dict):
        named["attention_mask"] = {n: own.get(f"attention_mask.{n}") for n in mask}
    elif mask is not None:
        named["attention_mask"] = own["attention_mask."]
    if args:
        return (ids, *args[1:]), named
    named["input_ids"] = ids
    return (), named
