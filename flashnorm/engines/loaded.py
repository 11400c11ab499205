"""A model that transformers has just loaded: what was asked for is done, or said not to be.

Whoever loads a model wants the model. So what cannot be done is a warning, and the model is as
transformers loaded it; `strict` makes it an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import nn

from flashnorm.errors import FlashNormError
from flashnorm.rewrite import fold_
from flashnorm.runtime import accelerate_
from flashnorm.runtime.package.options import Package
from flashnorm.warning import warn

Model = TypeVar("Model", bound=nn.Module)


class Wanted(Protocol):
    """What shall be done with a loaded model."""

    fold: bool
    untie: bool
    accelerate: bool
    training: bool
    package: str | os.PathLike[str] | Package | None
    strict: bool


def prepare_(model: Model, wanted: Wanted) -> Model:
    """`fold_`, then `accelerate_`, each as far as it is wanted; returns the model.

    A step that fails leaves the model as it was before, with a warning. With `strict` its error is
    raised: FlashNormError as these two raise it.
    """
    if wanted.fold:
        _try("folded", partial(fold_, model, untie=wanted.untie), model, wanted.strict)
    if wanted.accelerate:
        training, package = wanted.training, wanted.package
        accelerated = partial(accelerate_, model, training=training, package=package)
        _try("accelerated", accelerated, model, wanted.strict)
    return model


def _try(done: str, step: Callable[[], Any], model: nn.Module, strict: bool) -> None:
    try:
        step()
    except Exception as error:
        if strict:
            raise
        warn(f"{type(model).__name__} was loaded but not {done}: {in_words(error)}")


def in_words(error: Exception) -> str:
    """An error in one line; of one that is not ours, its kind as well."""
    words = " ".join(str(error).split())
    return words if isinstance(error, FlashNormError) else f"{type(error).__name__}: {words}"
