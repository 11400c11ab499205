"""Parts of what runs on a GPU that can be turned off: to see what each is worth, or to do without.

FLASHNORM_GPU_OFF has their names, with commas between, for a whole process. "early" holds for every
launch, the others for models that are accelerated meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flashnorm.errors import FlashNormError

NAMES = {
    "early": "kernels start before those in front of them have ended, and ask for their weights",
    "attention": "a new token attends by a kernel that reads valid positions only",
    "residual": "compiled graphs and captured steps add the residual in the product before it",
    "deferral": "in a compiled prefill an RMSNorm without a gain is applied behind the product",
}
VARIABLE = "FLASHNORM_GPU_OFF"

_off: tuple[str, ...] | None = None


def on(name: str) -> bool:
    """Whether a part is used. Raises FlashNormError where the variable names one that is not."""
    return name not in turned_off()


def turned_off() -> tuple[str, ...]:
    """The names of what is not used; compiled graphs are made for them."""
    global _off
    if _off is None:
        names = os.environ.get(VARIABLE, "").replace(" ", "").split(",")
        _off = _known(tuple(name for name in names if name), VARIABLE)
    return _off


@contextmanager
def off(*names: str) -> Iterator[None]:
    """A context in which these parts are not used, in the whole process, beside those before."""
    global _off
    before = turned_off()
    _off = tuple(sorted({*before, *_known(names, "off")}))
    try:
        yield
    finally:
        _off = before


def _known(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    for name in names:
        if name not in NAMES:
            raise FlashNormError(f"{where}: no part {name!r}; there are {', '.join(NAMES)}")
    return tuple(sorted(names))
