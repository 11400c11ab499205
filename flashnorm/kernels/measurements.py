"""Files of what was measured on a machine: JSON in the user's cache folder."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flashnorm.reading import parse_json, read_text

Found = TypeVar("Found")
OFF = "off"  # as the value of a variable: nothing is read or kept
_log = logging.getLogger("flashnorm")


def path(variable: str, name: str) -> Path | None:
    """The file that an environment variable names, or `name` in the cache folder; None: off."""
    if named := os.environ.get(variable):
        return None if named == OFF else Path(named)
    return folder() / name


def folder() -> Path:
    """flashnorm's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashnorm"


def read(
    file: Path | None, version: int, parse: Callable[[Any], dict[str, Found]]
) -> dict[str, Found]:
    """What `parse` makes of a file of this version; nothing where there is none or another."""
    if file is None:
        return {}
    try:
        text = read_text(file)
    except OSError:
        return {}
    except ValueError as error:
        return _unread(file, error)
    try:
        found = parse_json(text)
        if found["version"] != version:
            raise ValueError(f"version {found['version']}, not {version}")
        return parse(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return _unread(file, error)


def _unread(file: Path, error: Exception) -> dict[str, Found]:
    _log.warning("%s is not a file of measurements, so defaults are used: %s", file, error)
    return {}


def write(file: Path, data: dict[str, Any]) -> None:
    """Whole or not at all, through a name that nobody can guess and put a link at before."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as opened:
            opened.write(json.dumps(data, indent=1) + "\n")
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise
