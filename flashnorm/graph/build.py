"""A model from its config alone: every parameter is fake, so a model of any size takes seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flashnorm.compat.torch_names import FakeTensorMode
from flashnorm.compat.transformers_names import builder, no_init_weights
from flashnorm.errors import TraceError


def fake_model(model_class: Any, config: Any) -> nn.Module:
    """An instance of `model_class` with fake parameters, in the dtype that the config names.

    `model_class` is a transformers model class or auto class. Raises TraceError where it cannot be
    built from `config`.
    """
    build = builder(model_class)
    dtype = getattr(config, "dtype", None) or torch.float32
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
            model = build(config, dtype=dtype).eval()
            if hasattr(model, "tie_weights"):
                model.tie_weights()
            return model
    except Exception as error:
        raise TraceError(
            f"{type(config).__name__} could not be built into a model: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
