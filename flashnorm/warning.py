"""Warnings that point at the line which called flashnorm."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first line outside of the package; its commands count as outside."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_inside(module: str) -> bool:
    """`contextlib` stands between a function and what decorates it."""
    root, _, rest = module.partition(".")
    return module == "contextlib" or (root == "flashnorm" and rest.partition(".")[0] != "cli")
