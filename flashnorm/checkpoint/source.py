"""A checkpoint directory, opened and validated from its headers alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.header import Entry, Header, read_header
from flashnorm.checkpoint.store import Folder, Objects, Store
from flashnorm.content import why_damaged
from flashnorm.errors import CheckpointError
from flashnorm.loading import check_counts
from flashnorm.reading import read_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BOTH = (
    f"{{}} holds both {SINGLE} and {INDEX}, and readers differ in which one they load; remove one "
    "of them"
)
MAX_NAME = 240  # bytes: what file systems take, less the suffix of a file that is being written
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Place:
    """Where a tensor is: the name of its shard and its entry there."""

    shard: str
    entry: Entry


@dataclass(frozen=True)
class Source:
    """A validated checkpoint. `index` is None where one file holds all tensors.

    `path` is a directory of this machine with config and code; the shards may lie elsewhere, where
    `objects` says.
    """

    path: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    shards: dict[str, Header]
    where: dict[str, Place]  # by tensor name
    objects: Objects | None = None

    @property
    def store(self) -> Store:
        """Where the shards are."""
        return Folder(self.path) if self.objects is None else self.objects


def open_source(path: Path) -> Source:
    """Read config, index and every header under `path`; raise CheckpointError on what is wrong."""
    config = read_config(path)
    index = _read_index(path)
    return made_of(path, config, index, {n: _open_shard(path, n) for n in shard_names(index)})


def shard_names(index: dict[str, Any] | None) -> list[str]:
    """The files that hold the tensors of a checkpoint with this index, or without one."""
    return [SINGLE] if index is None else sorted(set(index["weight_map"].values()))


def made_of(
    path: Path, config: dict[str, Any], index: dict[str, Any] | None, shards: dict[str, Header]
) -> Source:
    """The checkpoint of these parts. Raises CheckpointError where they do not fit each other."""
    where = _locate(shards)
    if index is not None:
        _check_index(index["weight_map"], where)
    return Source(path, config, index, shards, where)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the directory `path`."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory: give the local directory of a checkpoint, or a GGUF file"
        )
    config = read_object(path / CONFIG)
    check_counts(config, str(path))
    return config


def read_object(file: Path, what: str = "checkpoint") -> dict[str, Any]:
    """The JSON object in a file that belongs to every `what`. Raises CheckpointError."""
    try:
        value = read_json(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}: not a {what}") from None
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from error
    except ValueError as error:
        found = why_damaged(file) or f"{file.name} is not valid JSON: {error}"
        raise CheckpointError(found) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} is not a JSON object")
    return value


def _read_index(path: Path) -> dict[str, Any] | None:
    """The index of a sharded checkpoint, None for a single file."""
    single, sharded = (path / SINGLE).exists(), (path / INDEX).exists()
    if single and sharded:
        raise CheckpointError(BOTH.format(path.name))
    if not single and not sharded:
        _refuse_without_weights(path)
    return read_index(path / INDEX) if sharded else None


def read_index(file: Path) -> dict[str, Any]:
    """The index in a file, which names plain files only. Raises CheckpointError."""
    index = read_object(file)
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{INDEX} has no weight_map")
    for name in weights.values():
        if not _is_shard(name):
            raise CheckpointError(
                f"{INDEX} names the shard {str(name)[:200]!r}, which is not a plain file name "
                "that ends in .safetensors"
            )
    return index


def _is_shard(name: Any) -> bool:
    """Whether it names a file beside the index, and none that a fold writes for itself."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or name.startswith("."):
        return False
    return Path(name).name == name and name.isprintable() and len(os.fsencode(name)) <= MAX_NAME


def _refuse_without_weights(path: Path) -> None:
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if damaged := next(filter(None, map(why_damaged, pickles)), ""):
        raise CheckpointError(damaged)
    raise CheckpointError(without_weights(path.name, bool(pickles)))


def without_weights(name: str, pickles: bool) -> str:
    """What is said of the checkpoint `name` that has no safetensors."""
    if pickles:
        return (
            f"{name} holds its weights as pickle files only, which flashnorm does not open; "
            "convert it first: load it with transformers' from_pretrained and write it with "
            "save_pretrained, which makes safetensors files"
        )
    return f"{name} has neither {SINGLE} nor {INDEX}: there is nothing to fold"


def _open_shard(path: Path, name: str) -> Header:
    if not (path / name).is_file():  # nor a pipe or a device
        raise CheckpointError(f"the shard {name} named by {INDEX} is missing from {path.name}")
    return read_header(path / name)


def _locate(shards: dict[str, Header]) -> dict[str, Place]:
    where: dict[str, Place] = {}
    for name, header in shards.items():
        for entry in header.entries:
            if entry.name in where:
                raise CheckpointError(
                    f"tensor {entry.name} is in both {where[entry.name].shard} and {name}"
                )
            where[entry.name] = Place(name, entry)
    return where


def _check_index(weight_map: dict[str, str], where: dict[str, Place]) -> None:
    for key, shard in weight_map.items():
        if key not in where or where[key].shard != shard:
            raise CheckpointError(f"{INDEX} places tensor {key} in {shard}, which does not hold it")
    for key, place in where.items():
        if key not in weight_map:
            raise CheckpointError(f"tensor {key} of {place.shard} is missing from {INDEX}")
