"""What a checkpoint directory holds, held against what a fold would write, but for the numbers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.compare import Difference
from flashnorm.checkpoint.files import other_files, weight_files
from flashnorm.checkpoint.header import Entry
from flashnorm.checkpoint.layout import Shard
from flashnorm.checkpoint.source import CONFIG, INDEX, Source
from flashnorm.checkpoint.target import Target

# Nothing in these says what a model computes, and people write into them.
PAPER_SUFFIXES = (".md", ".png", ".jpg", ".jpeg", ".svg", ".pdf")
PAPER_NAMES = {".gitattributes", ".gitignore", "license", "license.txt", "notice", "notice.txt"}
# What the marker says about the fold itself, in words.
REMARKS = ("version", "source", "left_out")
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class FileDifference:
    """A file that is not what the fold would write, and how."""

    file: str
    problem: str


@dataclass(frozen=True)
class Matched:
    """Tensors of a candidate beside those of a fold.

    `shards` are to be compared: (name of the candidate's file, pieces with its header). `moved`
    says that tensors lie in other files than the fold would put them.
    """

    shards: tuple[tuple[str, Shard], ...]
    differences: tuple[Difference, ...]
    moved: bool


def match_tensors(target: Target, candidate: Source) -> Matched:
    """Find every tensor of the fold in `candidate`, by name, whatever file it lies in."""
    shards: list[tuple[str, Shard]] = []
    differences: list[Difference] = []
    expected: dict[str, str] = {}
    for shard in target.layout.shards:
        expected |= {piece.entry.name: shard.name for piece in shard.pieces}
        pieces = defaultdict(list)
        for piece in shard.pieces:
            wrong = _compare_entry(piece.entry, shard.name, candidate)
            if wrong is None:
                pieces[candidate.where[piece.entry.name].shard].append(piece)
            else:
                differences.append(wrong)
        for file, found in pieces.items():
            beside = replace(shard, header=candidate.shards[file], pieces=tuple(found))
            shards.append((file, beside))
    differences += [
        Difference(name, place.shard, "extra", _described(place.entry))
        for name, place in candidate.where.items()
        if name not in expected
    ]
    moved = any(expected.get(name, p.shard) != p.shard for name, p in candidate.where.items())
    return Matched(tuple(shards), tuple(differences), moved)


def _compare_entry(entry: Entry, file: str, candidate: Source) -> Difference | None:
    if (place := candidate.where.get(entry.name)) is None:
        return Difference(entry.name, file, "missing", expected=_described(entry))
    found, said = place.entry, (_described(place.entry), _described(entry))
    if found.dtype != entry.dtype:
        return Difference(entry.name, place.shard, "dtype", *said)
    if found.shape != entry.shape:
        return Difference(entry.name, place.shard, "shape", *said)
    return None


def _described(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def spelled_otherwise(target: Target, candidate: Source) -> Iterator[str]:
    """Files with the fold's tensors whose headers have another order all the same, or spaces."""
    for shard in target.layout.shards:
        found = candidate.shards.get(shard.name)
        if found is None or found.raw == shard.header.raw:
            continue
        if {e.name for e in found.entries} == {e.name for e in shard.header.entries}:
            yield shard.name


def header_differences(target: Target, candidate: Source) -> Iterator[FileDifference]:
    """Where headers say more than names, dtypes and shapes: metadata, which readers ask for."""
    for shard in target.layout.shards:
        found = candidate.shards.get(shard.name)
        if found is not None:
            pair = found.metadata or {}, shard.header.metadata or {}
            for problem in _changes(*pair, "its __metadata__"):
                yield FileDifference(shard.name, problem)


def config_differences(target: Target, candidate: Source) -> Iterator[FileDifference]:
    """config.json, but for what the marker says of the fold in words."""
    found, expected = _without_remarks(candidate.config), _without_remarks(target.config)
    for problem in _changes(found, expected, ""):
        yield FileDifference(CONFIG, problem)


def index_differences(target: Target, candidate: Source) -> Iterator[FileDifference]:
    """The index, for tensors that lie in the files that the fold puts them in."""
    for problem in _changes(candidate.index or {}, target.index or {}, ""):
        yield FileDifference(INDEX, problem)


def _without_remarks(config: dict[str, Any]) -> dict[str, Any]:
    mark = config.get("flashnorm")
    if not isinstance(mark, dict):
        return config
    return {**config, "flashnorm": {k: v for k, v in mark.items() if k not in REMARKS}}


def remarks(target: Target, candidate: Source) -> Iterator[str]:
    """What the marker says otherwise about the fold, which no tensor depends on."""
    marks = [config.get("flashnorm") for config in (candidate.config, target.config)]
    if not all(isinstance(mark, dict) for mark in marks):
        return
    for key in REMARKS[:2]:
        found, expected = (str(mark.get(key)) for mark in marks)  # type: ignore[union-attr]
        if found != expected:
            yield f"the marker says {key} {_short(found)}; here it would be {_short(expected)}"


def _changes(found: Any, expected: Any, path: str) -> Iterator[str]:
    """In words, where two JSON values differ, by the innermost keys."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*expected, *found]):
            inner = f"{path}.{key}" if path else str(key)
            if key not in found:
                yield f"{inner} is missing, expected {_short(expected[key])}"
            elif key not in expected:
                yield f"{inner} is {_short(found[key])}, expected nothing"
            else:
                yield from _changes(found[key], expected[key], inner)
    elif _text(found) != _text(expected):
        yield f"{path} is {_short(found)}, expected {_short(expected)}"


def _text(value: Any) -> str:
    """JSON, because Python takes 1, 1.0 and true for equal, and NaN for unequal to itself."""
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def file_differences(
    target: Target, candidate: Source
) -> tuple[tuple[FileDifference, ...], tuple[str, ...]]:
    """Files beside config, index and shards, byte for byte; and the names of those that differ but
    that only people read."""
    known = {CONFIG, INDEX}
    expected = [name for name in target.copies if name not in known]
    extra = [*other_files(candidate.path, {*known, *expected}), *weight_files(candidate.path)]
    found = [*_copied(target.source.path, candidate.path, expected)]
    found += [
        FileDifference(name, "is there, and the fold would not write it")
        for name in extra
        if name not in candidate.shards
    ]
    paper = tuple(one.file for one in found if _is_paper(one.file))
    return tuple(one for one in found if one.file not in paper), paper


def _is_paper(name: str) -> bool:
    last = Path(name).name.lower()
    return last.endswith(PAPER_SUFFIXES) or last in PAPER_NAMES


def _copied(source: Path, candidate: Path, names: list[str]) -> Iterator[FileDifference]:
    for name in names:
        if not (candidate / name).is_file():
            yield FileDifference(name, "is missing")
        elif (at := _first_difference(candidate / name, source / name)) is not None:
            yield FileDifference(name, f"differs from the reference's from byte {at} on")


def _first_difference(one: Path, other: Path) -> int | None:
    """The first byte in which two files differ; None where they are equal."""
    done = 0
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            a, b = first.read(1 << 20), second.read(1 << 20)
            if a != b:
                return done + next(
                    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                    min(len(a), len(b)),
                )
            if not a:
                return None
            done += len(a)
