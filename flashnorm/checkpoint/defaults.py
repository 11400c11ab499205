"""What transformers gives a parameter that its checkpoint does not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashnorm.checkpoint.mapping import build_model
from flashnorm.checkpoint.source import Source
from flashnorm.compat.transformers_names import initializer
from flashnorm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def check_defaults(source: Source, wanted: Mapping[str, float]) -> None:
    """Raise CheckpointError unless a missing parameter begins at the value that is wanted of it.

    The modules' own initialization runs on values that are not numbers. A model that transformers
    does not know is not checked.
    """
    model: Any = build_model(source, wanted)
    if (initialize := initializer(model)) is None:
        return
    for name, value in wanted.items():
        path, _, attribute = name.rpartition(".")
        if not bool((_initial(model, path, attribute, initialize) == value).all()):
            raise CheckpointError(
                f"strict mode removes {name}, and transformers would then begin with a value other "
                f"than {value:g}, at which nothing is left of it: fold without strict"
            )


def _initial(
    model: Any, path: str, attribute: str, initialize: Callable[[nn.Module], object]
) -> Tensor:
    module = model.get_submodule(path)
    for name, parameter in list(module.named_parameters(recurse=False)):
        unset = torch.full(tuple(parameter.shape), torch.nan)
        setattr(module, name, nn.Parameter(unset, requires_grad=False))
    with torch.no_grad():
        initialize(module)
    return getattr(module, attribute)
