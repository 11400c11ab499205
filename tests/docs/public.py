"""The public names, from the lists that the package has of them."""

from __future__ import annotations

import flashnorm

ROOMS = ("functional", "nn")
NO_ENTRY = {"__version__", *ROOMS}  # a string, and two pages of their own


def public() -> list[str]:
    """Every public name by its path."""
    rooms = {"flashnorm": flashnorm} | {f"flashnorm.{r}": getattr(flashnorm, r) for r in ROOMS}
    return [f"{path}.{name}" for path, room in rooms.items() for name in room.__all__]
