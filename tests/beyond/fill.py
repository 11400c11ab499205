"""Constructors filled by the names of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from .specimen import Made


def load(path: str) -> Any:
    """`package.module:Name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def filled(cls: Callable[..., Any], values: Mapping[str, Any], **own: Any) -> Any:
    """An instance with every value whose name is a parameter of the constructor, and its own."""
    names = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in values.items() if key in names} | own)


def maker(
    path: str, values: Mapping[str, Any], own: dict[str, Any], inputs: Any
) -> Callable[[], Made]:
    """`inputs` is a value, or a function that makes it."""

    def make() -> Made:
        model = filled(load(path), values, **own)
        return model, inputs() if callable(inputs) else inputs

    return make
