"""A checkpoint in an object store, opened: small files are fetched, headers and gains are read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from flashnorm.checkpoint.files import is_other
from flashnorm.checkpoint.header import Header, header_bytes, parse_header
from flashnorm.checkpoint.remote import Facts, Remote
from flashnorm.checkpoint.source import (
    BOTH,
    CONFIG,
    INDEX,
    PICKLE_SUFFIXES,
    SINGLE,
    Source,
    made_of,
    read_config,
    read_index,
    shard_names,
    without_weights,
)
from flashnorm.checkpoint.store import Objects
from flashnorm.content import damage_of
from flashnorm.errors import CheckpointError

FIRST = 1 << 16  # bytes: the whole header of most files
AT_ONCE = 8  # requests


@contextmanager
def mirrored(remote: Remote) -> Iterator[tuple[Path, Objects]]:
    """A temporary directory with every small file of a checkpoint, and where its shards are.

    Raises CheckpointError where there is no checkpoint.
    """
    names = sorted(remote.listing())
    if not names:
        raise CheckpointError(f"there is nothing at {remote.url}")
    if CONFIG not in names:
        raise CheckpointError(
            f"{remote.url} has no {CONFIG}: not a checkpoint. A GGUF file has to be on this machine"
        )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        seen = dict(zip(names, pool.map(remote.facts, names), strict=True))
    with TemporaryDirectory(prefix="flashnorm-") as place:
        folder = Path(place) / remote.name
        try:
            for name in filter(is_other, seen):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                remote.download(name, seen[name][0], folder / name)
        except OSError as error:
            raise CheckpointError(
                f"{remote.url} could not be kept on this disk: {error}"
            ) from error
        yield folder, Objects(remote, seen)


def open_mirrored(folder: Path, objects: Objects) -> Source:
    """The checkpoint whose small files are in `folder`. Raises CheckpointError on what is wrong."""
    seen, url = objects.seen, objects.remote.url
    if SINGLE in seen and INDEX in seen:
        raise CheckpointError(BOTH.format(url))
    if SINGLE not in seen and INDEX not in seen:
        raise CheckpointError(without_weights(url, any(n.endswith(PICKLE_SUFFIXES) for n in seen)))
    index = read_index(folder / INDEX) if INDEX in seen else None
    names = shard_names(index)
    if missing := sorted(set(names) - seen.keys()):
        raise CheckpointError(f"the shard {missing[0]} named by {INDEX} is missing from {url}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        read = partial(_header, objects.remote)
        shards = dict(zip(names, pool.map(read, names, [seen[n] for n in names]), strict=True))
    return replace(made_of(folder, read_config(folder), index, shards), objects=objects)


def _header(remote: Remote, name: str, facts: Facts) -> Header:
    size = facts[0]
    raw = bytes(remote.read(name, 0, min(size, FIRST)))
    if damaged := damage_of(Path(name), raw[:512]) if size >= 8 else "":
        raise CheckpointError(damaged)
    length = header_bytes(Path(name), raw, size)
    if length > len(raw):
        raw += bytes(remote.read(name, len(raw), length - len(raw)))
    return parse_header(Path(name), raw[:length], size)
