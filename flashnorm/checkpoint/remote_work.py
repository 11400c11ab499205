"""A target in an object store, and its journal.

A store renames nothing: shards have their final names from the beginning, and appear when they are
uploaded whole. The target is a checkpoint once it has its config.json, which is written last. Until
then a journal lies in it, with the fingerprint of the fold, every name that it writes, and what is
known of each finished shard; a killed run leaves it, and the next one with the same fingerprint
goes on. Another starts over, and removes only what the journal names.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.parts import ObjectSlot
from flashnorm.checkpoint.remote import Facts, Remote
from flashnorm.checkpoint.source import CONFIG
from flashnorm.checkpoint.workdir import JOURNAL
from flashnorm.errors import CheckpointError, FlashNormError

EXISTS = "{} exists already: remove it or choose another name"


def check_remote_target(source: Path | Remote, target: Remote) -> None:
    """Raise CheckpointError unless `target` is free, or holds what a killed run has left."""
    if isinstance(source, Remote) and f"{target.url}/".startswith(f"{source.url}/"):
        raise CheckpointError(f"{target.url} is the source, or lies inside of it: choose another")
    _check_free(target, target.listing())


def _check_free(target: Remote, present: Collection[str]) -> None:
    if present and JOURNAL not in present:
        raise CheckpointError(EXISTS.format(target.url))


class RemoteWork:
    """An open target in an object store; made by `open_remote_work`."""

    def __init__(self, target: Remote, fingerprint: str, names: Collection[str]) -> None:
        self.target, self._owner = target, uuid.uuid4().hex
        self._config = b""
        self._journal: dict[str, Any] = {
            "fingerprint": fingerprint, "owner": self._owner, "names": sorted(names), "done": {}
        }  # fmt: skip

    def begin(self) -> None:
        """Keep the finished shards of a killed run with the same fingerprint, else start over."""
        present = self.target.listing()
        _check_free(self.target, present)
        if present:
            self._take_over(self._read_journal(), present)
        self._write_journal()

    def is_done(self, name: str, size: int) -> bool:
        """Whether a shard was finished by an earlier run, and is as that one left it."""
        done = self._journal["done"].get(name)
        if done is None or done[0][0] != size:
            return False
        with suppress(FlashNormError):
            return list(self.target.facts(name)) == done[0]
        return False

    def note(self, name: str) -> int:
        """The number recorded when the shard `name` was finished."""
        return int(self._journal["done"][name][1])

    def slot(self, name: str) -> ObjectSlot:
        """Where the shard `name` is uploaded."""
        return ObjectSlot(self.target, name)

    def finish(self, name: str, size: int, note: int = 0) -> None:
        """Record that the shard `name` is there."""
        facts: Facts = self.target.facts(name)
        if facts[0] != size:
            raise CheckpointError(f"{self.target.url}/{name} has {facts[0]} bytes, not {size}")
        self._check_owner()
        self._journal["done"][name] = [list(facts), note]
        self._write_journal()

    def copy(self, source: Path, name: str) -> None:
        """Copy a file that is no shard."""
        if name == CONFIG:
            self._config = source.read_bytes()
        else:
            self.target.upload(source, name, _untold)

    def write_json(self, name: str, value: Any) -> None:
        data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        if name == CONFIG:
            self._config = data  # by which the target becomes a checkpoint: the last one
        else:
            self.target.write(name, data)

    def publish(self) -> None:
        """Write config.json, by which the target is a checkpoint."""
        self._check_owner()
        if missing := set(self._journal["names"]) - self.target.listing() - {CONFIG}:
            raise CheckpointError(f"{self.target.url}/{min(missing)} was written, but is gone")
        self.target.write(CONFIG, self._config)
        self.target.remove(JOURNAL)

    def discard(self) -> None:
        """Remove everything that this run, and those before it, have written."""
        with suppress(FlashNormError):
            self._check_owner()
            present = self.target.listing()
            for name in sorted(present.intersection(self._journal["names"])):
                self.target.remove(name)
            self.target.remove(JOURNAL)

    def _take_over(self, found: dict[str, Any] | None, present: Collection[str]) -> None:
        if found is None:
            raise CheckpointError(EXISTS.format(self.target.url))
        names = {*found["names"]}
        if strange := sorted({*present} - names - {JOURNAL}):
            raise CheckpointError(
                f"{self.target.url} holds {strange[0]}, which no fold wrote: remove it or choose "
                "another name"
            )
        if found["fingerprint"] == self._journal["fingerprint"]:
            self._journal["done"] = found["done"]
            return
        if CONFIG in present:
            raise CheckpointError(EXISTS.format(self.target.url))
        for name in sorted(names.intersection(present)):
            self.target.remove(name)

    def _check_owner(self) -> None:
        """No lock holds in a store: whoever began last goes on, and the others end here."""
        found = self._read_journal()
        if found is None or found["owner"] != self._owner:
            raise CheckpointError(
                f"another process is writing {self.target.url}: wait for it to end"
            )

    def _read_journal(self) -> dict[str, Any] | None:
        text = self.target.read(JOURNAL, 0, self.target.facts(JOURNAL)[0])
        try:
            found = json.loads(text.decode())
            known = all(isinstance(facts, list) for facts, _ in found["done"].values())
            known = known and all(isinstance(name, str) for name in found["names"])
            return found if known and found["fingerprint"] and found["owner"] else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def _write_journal(self) -> None:
        self.target.write(JOURNAL, json.dumps(self._journal, indent=1).encode())


def _untold(count: int) -> None:
    """These bytes are not counted."""


@contextmanager
def open_remote_work(
    target: Remote, fingerprint: str, names: Collection[str]
) -> Iterator[RemoteWork]:
    """Open or resume the target `target`, in which `names` will be written.

    An error removes what was written; an interrupt leaves it for the next run.
    """
    work = RemoteWork(target, fingerprint, names)
    work.begin()
    try:
        yield work
    except Exception:
        work.discard()
        raise
