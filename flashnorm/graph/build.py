"""A model from its config alone: every parameter is fake, so a model of any size takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from flashnorm.compat.torch_names import FakeTensorMode
from flashnorm.compat.transformers_names import builder, built_class, no_init_weights
from flashnorm.errors import TraceError
from flashnorm.graph.ambient import undisturbed

MOST_FEATURES = 1 << 24  # the largest vocabularies have a sixtieth of it
MOST_MODULES = 200_000  # of the largest mixtures, with a module for each expert, half as many


def fake_model(model_class: Any, config: Any) -> nn.Module:
    """An instance of `model_class` with fake parameters, in the dtype that the config names.

    `model_class` is a transformers model class or auto class. Raises TraceError where it cannot be
    built from `config`. What its code keeps elsewhere than in the model is as before afterwards.
    """
    build = builder(model_class)
    dtype = getattr(config, "dtype", None) or torch.float32
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with undisturbed(_kinds(model_class, config)), mode, no_init_weights(), few_modules():
            model = build(config, dtype=dtype).eval()
            _check_widths(model)
            if hasattr(model, "tie_weights"):
                model.tie_weights()
            return model
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(config).__name__} could not be built into a model: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _check_widths(model: nn.Module) -> None:
    """What is known of features takes memory for each of them, unlike the parameter itself."""
    for name, parameter in model.named_parameters():
        if max(parameter.shape, default=0) > MOST_FEATURES:
            raise TraceError(
                f"the config asks for a {name} of shape {list(parameter.shape)}: no model has more "
                f"than {MOST_FEATURES} features"
            )


@contextmanager
def few_modules(most: int = MOST_MODULES) -> Iterator[None]:
    """Raise TraceError where a config asks for more modules than any model has: they alone would
    fill the memory, though no parameter takes any."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise TraceError(f"the config asks for a model of more than {most} modules")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _kinds(model_class: Any, config: Any) -> Iterator[type]:
    """The classes that a model is made of, as far as one file defines them."""
    kind = built_class(model_class, config)
    kind = kind if isinstance(kind, type) else model_class  # one of several
    space = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
    yield kind
    yield from (
        held
        for held in list(space.values())
        if isinstance(held, type) and held.__module__ == kind.__module__
    )
