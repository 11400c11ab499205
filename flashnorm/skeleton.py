"""A transformers model without memory for its parameters, and what takes their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.transformers_names import builder, no_init_weights
from flashnorm.extras import need
from flashnorm.graph.build import few_modules
from flashnorm.loading import check_complete, model_class


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, its parameters on the meta device, its buffers as it makes them."""
    need("a model whose weights stay in their files", "accelerate")
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), no_init_weights(), few_modules():
        return builder(model_class(config))(config, dtype=dtype)


def place_(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a tensor be the parameter or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def complete_(model: Any, name: str) -> None:
    """Tie what is tied. Raises CheckpointError where parameters have no values then."""
    model.tie_weights(missing_keys={*_missing(model)}, recompute_mapping=False)
    check_complete(model, {"missing_keys": [*_missing(model)]}, name)


def _missing(model: nn.Module) -> Iterator[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    return (name for name, parameter in parameters if parameter.is_meta)
