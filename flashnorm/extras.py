"""Packages that an extra brings: kernels and live modules do without them."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from flashnorm.errors import FlashNormError

# What `flashnorm[hf]` asks for in pyproject.toml, and from which version on.
HF = {
    "transformers": (5, 16),
    "filelock": (3, 21),
    "rich": (13, 0),
    "typer": (0, 15),
    "accelerate": (1, 0),
    "packaging": (22, 0),
}
INSTALL = 'pip install "flashnorm[hf]"'


def need(purpose: str, *packages: str) -> None:
    """Raise FlashNormError where packages of `HF` are missing or too old, with what installs them.

    purpose: what needs them, as the sentence begins.
    """
    wrong = [f"{name} {said}" for name in packages if (said := why_not(name))]
    if wrong:
        raise FlashNormError(
            f"{purpose} needs {' and '.join(packages)}, but {', '.join(wrong)}: {INSTALL}"
        )


def why_not(package: str) -> str:
    """What is wrong with a package of `HF`: it is missing, or too old; empty where it is fine."""
    if package not in sys.modules and find_spec(package) is None:
        return "is not installed"
    oldest, found = HF[package], _version(package)
    if found and found < oldest:
        return f"is {_dotted(found)}, older than {_dotted(oldest)}"
    return ""


def _version(package: str) -> tuple[int, ...]:
    """Major and minor; nothing where they are not known, as of sources on the path."""
    try:
        return tuple(map(int, re.findall(r"\d+", version(package))[:2]))
    except PackageNotFoundError:
        return ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
