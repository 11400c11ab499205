"""Models with packages, for the tests of what packages compute and of how they are kept."""

from __future__ import annotations

import copy

import torch

import flashnorm
from tests.runtime.models import LLAMA, tiny

LENGTH = 40


def accelerated(directory, config=LLAMA, dtype=torch.float32, batch=1):
    """A model as it is, and one like it with a package."""
    original = config(dtype) if callable(config) else tiny(config, dtype)
    package = flashnorm.Package(directory, LENGTH, batch)
    return original, flashnorm.accelerate_(copy.deepcopy(original), package=package)
