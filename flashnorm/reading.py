"""Small files that others wrote: text and JSON, read within bounds, so that none can do harm."""

from __future__ import annotations

import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000_000  # as much as a safetensors header may have
MAX_DEPTH = 100  # lists and objects inside of each other; copies and writers of JSON recurse
MAX_DIGITS = 40  # of a whole number; counts of bytes need 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(file: Path) -> BufferedReader:
    """Open a file to read its bytes.

    Raises OSError where there is none, ValueError for a directory, a device, or a pipe, which would
    wait for ever or never end.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file")
    opened = open(file, "rb", opener=_without_waiting)  # noqa: SIM115
    if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        return opened
    opened.close()
    raise ValueError("it is no regular file")


def _without_waiting(name: str, flags: int) -> int:
    """For what became a pipe since it was looked at."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(file: Path, most: int = MAX_BYTES) -> str:
    """The text of a file. Raises OSError where it cannot be read, ValueError where it is no UTF-8,
    longer than `most` bytes, or no regular file."""
    with open_regular(file) as opened:
        found = opened.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it is longer than {most} bytes")
    return found.decode("utf-8")


def read_json(file: Path) -> Any:
    """The JSON value in a file; raises as `read_text` and `parse_json` do."""
    return parse_json(read_text(file))


def parse_json(text: str, *, unique: bool = False) -> Any:
    """The JSON value of a text. Raises ValueError where it is none; where it is nested deeper than
    MAX_DEPTH, has longer whole numbers than MAX_DIGITS, or text that is no Unicode (a surrogate by
    itself); and with `unique` where an object has a key twice."""
    try:
        found = json.loads(text, parse_int=_whole, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_depth(found)
    if _SURROGATE.search(text):
        _check_text(found)
    return found


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            part
            for holder in level
            if isinstance(holder, (dict, list))
            for part in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH}")


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character (a surrogate by itself)") from error
