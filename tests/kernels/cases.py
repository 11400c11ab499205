"""Calls with random parameters, and the kernels that this machine can run."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from flashnorm.kernels import norms
from flashnorm.kernels.call import ACTIVATIONS, Call
from flashnorm.kernels.cpu import crossovers
from flashnorm.kernels.cpu.library import Library, load
from flashnorm.kernels.weights import DTYPES as NUMBERS

library = load()
ISAS = library.supported() if isinstance(library, Library) else []
DTYPES = list(NUMBERS)
EVERY_NORM, EVERY_ACTIVATION = list(norms.KINDS), list(ACTIVATIONS)

# Without a compiler there is nothing to test; with one, kernels that are missing are a defect.
compiled = pytest.mark.skipif(
    not ISAS and shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="no C++ compiler, so no kernels",
)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    """On torch's default device."""
    made = torch.Generator(torch.get_default_device()).manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=made, dtype=torch.float64) * scale).to(dtype)


def make(
    shape: tuple[int, ...],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    norm: str = "rms",
    *,
    gain: bool = False,
    norm_bias: bool = False,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
    **more: Any,
) -> Call:
    """x is `shape`; rows of x have a mean, and no parameter is one or zero by chance."""
    n = shape[-1]
    return Call(
        random(*shape, dtype=dtype, scale=2, seed=1) + 0.7,
        [random(k, n, dtype=dtype, scale=n**-0.5, seed=i) for i, k in enumerate(widths)],
        [random(k, dtype=dtype, seed=i + 7) for i, k in enumerate(widths)] if bias else None,
        norms.find(norm),
        1e-5,
        random(n, dtype=dtype, seed=3) if gain else None,
        1.0,
        random(n, dtype=dtype, seed=4) if norm_bias else None,
        torch.tensor([0.4], dtype=dtype) if norm == "dyt" else None,
        activation,
        random(*shape[:-1], widths[0], dtype=dtype, seed=5) if residual else None,
    )._replace(**more)


def rows_for_kernels(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The library gets what has more rows than that, on every instruction set."""
    row = crossovers.Crossover(0, most)
    monkeypatch.setattr(crossovers, "find", lambda isa, dtype, n: row)
