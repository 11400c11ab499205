"""`--html FILE`: a page is promised before a command works, and written after it has spoken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashnorm.paged import Paged

Last = Callable[[], None]


def promised(file: Path | None) -> Callable[..., Last | None]:
    """Raises FlashNormError now where `file` cannot be written, before anything is measured.

    The function that comes back makes of a record, or several, and its title what writes the page.
    """
    if file is None:
        return lambda *_: None
    from flashnorm.html.write import check

    check(file)
    return lambda *record: lambda: _write(file, *record)


def _write(file: Path, records: Paged | list[Paged], titles: str | list[str] = "") -> None:
    from flashnorm.html.page import document
    from flashnorm.html.write import write

    text = document(
        records if isinstance(records, list) else [records],
        titles if isinstance(titles, list) else [_short(titles)],
    )
    write(file, text)
    sys.stderr.write(f"written: {file}, {len(text.encode('utf-8', 'replace')) / 1e3:,.0f} kB\n")


def _short(name: str) -> str:
    """The last part of a path or an id; of a config the directory that it lies in."""
    parts = [part for part in Path(name).parts if part != "config.json"]
    return parts[-1] if parts else ""
