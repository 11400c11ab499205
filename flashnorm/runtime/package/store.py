"""Packages in a directory: a library each, and what it is for; they appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashnorm.errors import FlashNormError
from flashnorm.runtime.package.compiled import LIBRARY

FORMAT = 1
DESCRIPTION = "step.json"


@dataclass(frozen=True)
class Description:
    """What is written beside a library. names: the parameters and buffers that it is given."""

    fingerprint: dict[str, str]
    names: tuple[str, ...]
    sha256: str = ""
    format: int = FORMAT


def read(place: Path, fingerprint: dict[str, str]) -> Description | None:
    """The package at `place`, or None where there is none.

    Raises FlashNormError for one that is damaged, or was made for something else.
    """
    if not place.exists():
        return None
    try:
        held = json.loads((place / DESCRIPTION).read_text("utf-8"))
        found = Description(**{**held, "names": tuple(held["names"])})
        digest = _digest(place / LIBRARY)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(place, f"is damaged ({type(error).__name__}: {error})") from error
    if found.format != FORMAT:
        raise _refusal(place, f"has format {found.format}, not {FORMAT}")
    if digest != found.sha256:
        raise _refusal(place, f"is damaged: {LIBRARY} is not the file that was written")
    if found.fingerprint != fingerprint:
        raise _refusal(place, f"was made for something else: {_differing(found, fingerprint)}")
    return found


def _differing(found: Description, fingerprint: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {found.fingerprint.get(key)!r}, not {fingerprint.get(key)!r}"
        for key in sorted({*found.fingerprint, *fingerprint})
        if found.fingerprint.get(key) != fingerprint.get(key)
    )


def _refusal(place: Path, why: str) -> FlashNormError:
    return FlashNormError(f"the package {place} {why}; delete it to have it made again")


@contextmanager
def being_made(place: Path) -> Iterator[Path]:
    """A new directory beside `place`, that is there when the context ends without an error."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
    except OSError as error:
        raise FlashNormError(f"packages cannot be kept in {place.parent}: {error}") from error
    try:
        yield made
        try:
            made.rename(place)
        except OSError:
            if not place.exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write(made: Path, description: Description) -> None:
    """The description of the library that is in `made` by now."""
    whole = {**asdict(description), "sha256": _digest(made / LIBRARY)}
    (made / DESCRIPTION).write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
