"""A page becomes a file: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flashnorm.errors import FlashNormError


def check(file: Path) -> None:
    """Say before anything is measured that `file` cannot be written. Raises FlashNormError."""
    parent = file.expanduser().absolute().parent
    if not parent.is_dir():
        raise FlashNormError(f"{file} cannot be written: there is no directory {parent}, make it")
    if os.path.lexists(file) and not file.is_file():
        raise FlashNormError(f"{file} cannot be written: it is no file, name another one")
    with _explained(file), _part(file.expanduser()) as part:
        part.touch()


def write(file: Path, text: str) -> None:
    """Write a page beside `file` and rename it. Raises FlashNormError; nothing is left then."""
    check(file)
    file = file.expanduser()
    with _explained(file), _part(file) as part:
        # A name may hold half a character, which no encoding has.
        part.write_bytes(text.encode("utf-8", "replace"))
        part.replace(os.path.realpath(file))


@contextmanager
def _part(file: Path) -> Iterator[Path]:
    """A new file beside the target, which is gone afterwards if it was not renamed."""
    target = Path(os.path.realpath(file))
    part = target.with_name(f".flashnorm-{os.getpid()}.part")
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise FlashNormError(
            f"{file} cannot be written ({why}): name a file where there is room and permission"
        ) from error
