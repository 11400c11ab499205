"""What the measuring process tells the one that watches it, and how files are handed on.

Nothing here needs more than Python: the watching process has to work whatever became of the other.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

# Exit codes. The last two are of the measuring process only, which is started again.
WRONG, USAGE, CUT, BROKEN, CRASHED = 1, 2, 3, 4, 5
NOW, RESULTS, SUMMARY, TUNED = "now.json", "results.json", "summary.txt", "gpu.json"
SINGLE = (RESULTS, "tables.md", SUMMARY, "plot.png", TUNED)
REST = "rest.tar.gz"  # the others: CSV files and the log
MOST_FILES = 8
MOST_BYTES = 16 * 2**20  # of one file


def replaced(target: Path, fill: Callable[[Path], object]) -> str:
    """Put a file that `fill` writes in the place of `target`, at once. Returns why not, or ""."""
    partial = target.with_name("partial")
    try:
        fill(partial)
        if partial.stat().st_size > MOST_BYTES:
            raise OSError(f"it is larger than {MOST_BYTES >> 20} MiB")
        os.replace(partial, target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        return str(error)
    return ""


@dataclass(frozen=True)
class Progress:
    """The piece that is measured now, and the seconds that its stage has left for it."""

    stage: str
    piece: str
    seconds: float
    since: float = 0.0

    def write(self, folder: Path) -> None:
        text = json.dumps({**asdict(self), "since": time.time()})
        # On a full disk nobody watches this piece.
        replaced(folder / NOW, lambda partial: partial.write_text(text, "utf-8"))

    @staticmethod
    def read(folder: Path) -> Progress | None:
        try:
            return Progress(**json.loads((folder / NOW).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def deliver(work: Path, out: Path) -> list[str]:
    """Copy what was found, each file whole at any moment. Returns what could not be, and why.

    out gets at most MOST_FILES files, none of them larger than MOST_BYTES.
    """
    failed = []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"{out}: {error}"]
    for name in SINGLE:
        if (work / name).exists() and (why := _copy(work / name, out / name)):
            failed.append(f"{name}: {why}")
    if why := _pack(work, out / REST):
        failed.append(f"{REST}: {why}")
    return failed


def _copy(source: Path, target: Path) -> str:
    if target.exists() and source.stat().st_mtime_ns == target.stat().st_mtime_ns:
        return ""
    return replaced(target, lambda partial: shutil.copy2(source, partial))


def _pack(work: Path, target: Path) -> str:
    """The other small files of the working folder, as one archive."""
    names = sorted(
        path.name
        for path in work.iterdir()
        if path.suffix in (".csv", ".txt") and path.name not in SINGLE
    )

    def fill(partial: Path) -> None:
        with tarfile.open(partial, "w:gz") as archive:
            for name in names:
                archive.add(work / name, name)

    return replaced(target, fill)
