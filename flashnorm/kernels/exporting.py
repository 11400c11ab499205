"""Whether a program is exported, as code that torch.compile reads may ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flashnorm.compat.torch_names import export_flag

_kept = False


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether torch.export runs: the program must run where flashnorm is not installed."""
    return export_flag() and not _kept


@contextmanager
def operators_kept() -> Iterator[None]:
    """A context in which an exported program calls our operators, as a compiled graph does."""
    global _kept
    before, _kept = _kept, True
    try:
        yield
    finally:
        _kept = before
