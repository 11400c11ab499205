"""What was found, in files that are whole at any moment; a later run goes on where one was cut."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.handoff import RESULTS, replaced

Row = dict[str, Any]
LOG = "log.txt"


class Store:
    """The rows of every stage, in WORK/results.json; each row says which run measured it.

    `ended` says why stages and pieces of this run are incomplete. Where the disk does not take a
    file, the rows stay in memory, and `ended` says so.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.file = folder, folder / RESULTS
        if self.file.exists() and not resume:
            raise SystemExit(
                f"{self.file} exists: give --resume to go on, or another --work to begin anew"
            )
        found = json.loads(self.file.read_text("utf-8")) if self.file.exists() else {}
        self.runs: list[Row] = found.get("runs", [])
        self.stages: dict[str, list[Row]] = found.get("stages", {})
        self.ended: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, environment: Row) -> None:
        """Note the machine of this run. Raises SystemExit where the others had another card."""
        for earlier in self.runs:
            if earlier["card"] != environment["card"]:
                raise SystemExit(
                    f"{self.folder} holds results of {earlier['card']}, and this is "
                    f"{environment['card']}: give another --work"
                )
        self.runs.append(environment)
        self.write()

    def rows(self, stage: str) -> list[Row]:
        return self.stages.get(stage, [])

    def find(self, stage: str, **key: Any) -> Row | None:
        """The row of a stage that has all these values."""
        fitting = (row for row in self.rows(stage) if _matches(row, key))
        return next(fitting, None)

    def put(self, stage: str, key: Row, found: Row) -> None:
        """Keep what was found for a key, in place of what was there."""
        rows = self.stages.setdefault(stage, [])
        before = self.find(stage, **key)
        row = {"run": len(self.runs) - 1, **key, **found}
        if before is None:
            rows.append(row)
        else:
            rows[rows.index(before)] = row
        self.write()

    def write(self) -> None:
        """results.json, replaced at once: a cut leaves the old one or the new one."""
        content = {"runs": self.runs, "stages": self.stages, "incomplete": self.ended}
        self.write_text(RESULTS, json.dumps(content, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A file of the folder, replaced at once."""
        if why := replaced(self.folder / name, lambda partial: partial.write_text(text, "utf-8")):
            self.ended[name] = f"could not be written, its rows are in the output only: {why}"

    def log(self, line: str) -> None:
        # On a full disk it is at least printed.
        with suppress(OSError), (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_csv(self) -> None:
        """STAGE.csv for every stage, nested values in columns of their own."""
        for stage, rows in self.stages.items():
            flat = [dict(_flat(row)) for row in rows]
            header = list(dict.fromkeys(name for row in flat for name in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, header, lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
            self.write_text(f"{stage}.csv", text.getvalue())


def _matches(row: Row, key: Row) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def _flat(row: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
