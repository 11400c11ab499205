"""Packages in a directory: a library each, and what it is for; they appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashnorm.errors import FlashNormError
from flashnorm.reading import read_json
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
    if not os.path.lexists(place):
        return None
    if why := why_not_trusted(place):
        raise FlashNormError(f"the package {place} is not used: {why}")
    try:
        held = read_json(place / DESCRIPTION)
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


def why_not_trusted(place: Path) -> str:
    """Why nobody may run what lies in a directory: a library is code. Empty where all is well.

    The directory and what is in it have to be this user's, or root's, and others may not write to
    them, nor to the directory around it, unless that is sticky, as /tmp is: names stay theirs.
    """
    if not hasattr(os, "geteuid"):
        return ""
    for path in (place.parent, place, place / LIBRARY, place / DESCRIPTION):
        try:
            found = path.lstat() if path != place.parent else path.stat()
        except OSError:
            continue  # what is missing is said by who reads it
        around = path == place.parent
        if stat.S_ISLNK(found.st_mode):
            return f"{path} is a link"
        if found.st_mode & stat.S_IWOTH and not (around and found.st_mode & stat.S_ISVTX):
            return f"every user may write to {path}; take that right away, and delete the package"
        if found.st_uid not in (0, os.geteuid()) and not around:
            return f"{path} belongs to another user; name a directory of your own"
    return ""


def _differing(found: Description, fingerprint: dict[str, Any]) -> str:
    if not isinstance(found.fingerprint, dict):
        return f"fingerprint {found.fingerprint!r}"
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
