"""What an evaluation is asked for, what it finds, and that as tables and files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from flashnorm.bench.machine import line
from flashnorm.bench.show import group, markdown_table
from flashnorm.bench.tables import NOTHING, Table

ORIGINAL, FOLDED, ACCELERATED = "original", "folded", "accelerated"
VARIANTS = (ORIGINAL, FOLDED, ACCELERATED)
AUTO = "as stored"


@dataclass(frozen=True)
class Settings:
    """What to evaluate. `dtypes` are names as in `flashnorm bench`, or `AUTO`.

    `folded` is a checkpoint; without it `base` is folded in memory. `limit` is how many documents
    of each task are read, all if None. `include` has task files of the user's own.
    """

    base: str
    tasks: tuple[str, ...]
    folded: str | None = None
    dtypes: tuple[str, ...] = (AUTO,)
    variants: tuple[str, ...] = VARIANTS
    limit: int | None = None
    batch_size: int = 1
    include: str | None = None


@dataclass(frozen=True)
class Score:
    """One metric of one task, of a variant in a dtype. `count` documents; None where not told."""

    dtype: str
    variant: str
    task: str
    metric: str
    value: float
    count: int | None


@dataclass(frozen=True)
class Note:
    """What a variant is: the checkpoint, how much was folded, how much runs on kernels."""

    dtype: str
    variant: str
    words: str


@dataclass(frozen=True)
class Failure:
    """What could not be evaluated, and why. `task` is empty where the variant was not there."""

    dtype: str
    variant: str
    task: str
    error: str


@dataclass
class Result:
    """Everything that was found until now."""

    settings: Settings
    machine: dict[str, str | int]
    scores: list[Score] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The settings with the models' names alone, and a row for each metric."""
        asked = asdict(self.settings)
        names = {key: _name(asked[key]) for key in ("base", "folded", "include") if asked[key]}
        return {
            "settings": asked | names,
            "machine": self.machine,
            "rows": [row.to_json() for row in rows(self)],
            "notes": [asdict(note) for note in self.notes],
            "failures": [asdict(failure) for failure in self.failures],
        }


@dataclass(frozen=True)
class Row:
    """A metric of a task in a dtype, by variant."""

    dtype: str
    task: str
    metric: str
    count: int | None
    values: dict[str, float]

    def difference(self, variant: str) -> float | None:
        """From the original; None where there is none."""
        if variant == ORIGINAL or not {variant, ORIGINAL} <= set(self.values):
            return None
        return self.values[variant] - self.values[ORIGINAL]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "differences": {v: self.difference(v) for v in self.values}}


def rows(result: Result) -> list[Row]:
    """The scores beside each other, in the order in which they came."""
    found: dict[tuple[str, str, str], Row] = {}
    for score in result.scores:
        key = (score.dtype, score.task, score.metric)
        row = found.setdefault(key, Row(*key, score.count, {}))
        row.values[score.variant] = score.value
    return list(found.values())


def tables(result: Result) -> Iterator[Table]:
    """One for each dtype: a metric in a row, and by how much each variant differs."""
    for dtype in result.settings.dtypes:
        here = [row for row in rows(result) if row.dtype == dtype]
        notes = [f"{n.variant}: {n.words}" for n in result.notes if n.dtype == dtype]
        failed = [_failed(failure) for failure in result.failures if failure.dtype == dtype]
        if here or failed:
            header, cells = _header(result.settings), [_cells(row, result.settings) for row in here]
            yield Table(dtype, header, tuple(cells), ". ".join([*notes, *failed]))


def heading(result: Result) -> list[str]:
    """What was evaluated, where and how."""
    asked = result.settings
    given = _name(asked.folded) if asked.folded else "folded in memory"
    limit = "all documents" if asked.limit is None else f"{asked.limit} documents of each task"
    versions = f"lm_eval {result.machine['lm_eval']}, datasets {result.machine['datasets']}"
    return [
        f"Base: {_name(asked.base)}; folded: {given}; {limit}, batches of {asked.batch_size}.",
        f"Machine: {line(result.machine)}, {versions}.",
    ]


def view(result: Result) -> RenderableType:
    """All of it for a terminal."""
    return Group(*map(Text, heading(result)), *(group(table) for table in tables(result)))


def markdown(result: Result) -> str:
    """The same as Markdown."""
    lines = [f"# {_name(result.settings.base)}", ""]
    for words in heading(result):
        lines += [words, ""]
    for table in tables(result):
        lines += markdown_table(table)
    return "\n".join(lines).rstrip() + "\n"


def paths(prefix: Path) -> list[Path]:
    """The files of a result."""
    return [prefix.with_name(f"{prefix.name}.{ending}") for ending in ("json", "md")]


def write(result: Result, prefix: Path) -> None:
    """Write PREFIX.json and PREFIX.md, each at once: an interrupt leaves whole files."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    words = (json.dumps(result.to_json(), indent=1) + "\n", markdown(result))
    for file, content in zip(paths(prefix), words, strict=True):
        part = file.with_name(f"{file.name}.part")
        part.write_text(content, "utf-8")
        part.replace(file)


def figure(value: float) -> str:
    """Eight digits: more than a difference between float32 models leaves equal."""
    return f"{value:.8g}"


def _header(asked: Settings) -> tuple[str, ...]:
    names = ["task", "metric", "documents"]
    for variant in asked.variants:
        names += [variant] if variant == ORIGINAL else [variant, "difference"]
    return tuple(names)


def _cells(row: Row, asked: Settings) -> tuple[str, ...]:
    cells = [row.task, row.metric, NOTHING if row.count is None else str(row.count)]
    for variant in asked.variants:
        value, difference = row.values.get(variant), row.difference(variant)
        cells.append(NOTHING if value is None else figure(value))
        if variant != ORIGINAL:
            cells.append(NOTHING if difference is None else f"{difference:+.2g}")
    return tuple(cells)


def _failed(failure: Failure) -> str:
    place = f" in {failure.task}" if failure.task else ""
    return f"{failure.variant} failed{place}: {failure.error}"


def _name(source: str) -> str:
    """The last part of a path; a hub id as it is."""
    path = Path(source).expanduser()
    return path.absolute().name if path.exists() else source
