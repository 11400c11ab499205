"""Calls that no kernel takes: counted by their reasons, said once each, or forbidden."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from flashnorm.errors import FlashNormError

_log = logging.getLogger("flashnorm")
_fallbacks: Counter[str] = Counter()
_forbidden = os.environ.get("FLASHNORM_FALLBACK") == "forbid"


def fallbacks() -> dict[str, int]:
    """Why calls in this process ran on the reference, and how many did."""
    return dict(_fallbacks)


@contextmanager
def forbid_fallback(forbid: bool = True) -> Iterator[None]:
    """Raise instead of falling back, in the whole process (also: FLASHNORM_FALLBACK=forbid)."""
    global _forbidden
    before, _forbidden = _forbidden, forbid
    try:
        yield
    finally:
        _forbidden = before


def fell_back(reason: str) -> None:
    """Count a fallback and say the first of its kind; raise where falling back is forbidden."""
    if _forbidden:
        raise FlashNormError(f"norm + linear has to fall back, which is forbidden: {reason}")
    if reason not in _fallbacks:
        _log.info("norm + linear runs on plain torch: %s", reason)
    _fallbacks[reason] += 1
