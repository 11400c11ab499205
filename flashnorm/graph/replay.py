"""Running recorded operations again, in float64, on other numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashnorm.graph.failures import UnknownSpelling
from flashnorm.graph.ir import Node, substitute


def run(node: Node, value: Callable[[int], Tensor]) -> list[Tensor]:
    """The outputs of one operation, with casts to a narrower floating type left out.

    Raises UnknownSpelling where it does not run.
    """
    kwargs = {key: _widened(substitute(item, value)) for key, item in node.kwargs.items()}
    kwargs.pop("device", None)
    args = [_widened(substitute(item, value)) for item in node.args]
    try:
        out = node.func(*args, **kwargs)
    except Exception as error:  # it may be anybody's, and was never run on such numbers
        raise UnknownSpelling(f"{node.op} does not run on other numbers: {error}") from error
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _widened(item: Any) -> Any:
    is_float = isinstance(item, torch.dtype) and item.is_floating_point
    return torch.float64 if is_float else item
