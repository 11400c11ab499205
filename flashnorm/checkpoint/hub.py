"""A model on the hub: its config, the headers of its weights, and single small tensors of them.

Nothing else of the weights is asked for. Parts of files are requested by their bytes, at the commit
that the config is from; a server that answers with a whole file instead is not listened to. What
the hub's own cache holds is read there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from flashnorm.checkpoint.header import FLOAT_DTYPES, Header, header_bytes, parse_header
from flashnorm.checkpoint.source import (
    CONFIG,
    INDEX,
    SINGLE,
    Place,
    Source,
    made_of,
    open_source,
    read_config,
    read_index,
    shard_names,
)
from flashnorm.checkpoint.values import load_tensor
from flashnorm.errors import CheckpointError, FlashNormError

FIRST = 2**16  # bytes: the whole header of most files
SMALL = 2**22  # bytes: a tensor that is larger is no gain, and is not asked for
AT_ONCE = 8  # requests
PATIENCE = 30.0  # seconds
Part = Callable[[str, int, int], tuple[bytes, int]]  # file, start, end: bytes, size of the file
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Missing(CheckpointError):
    """A file that the repository does not have."""


def snapshot(name: str) -> Path:
    """The folder in the hub's cache that has config.json as it is now; it is fetched if need be.

    Raises CheckpointError where the hub has no such model or does not give it, with the mend.
    """
    return _fetched(name, CONFIG, None).parent


@dataclass
class Remote:
    """A checkpoint whose tensors lie elsewhere, or in the hub's cache, where `part` is None."""

    source: Source
    part: Part | None
    held: dict[str, Tensor] = field(default_factory=dict)

    def load(self, source: Source, place: Place) -> Tensor:
        """One small tensor. Raises CheckpointError where it is not small or cannot be had."""
        if self.part is None:
            return load_tensor(source, place)
        if (name := place.entry.name) not in self.held:
            self.held[name] = self._load(place)
        return self.held[name]

    def ahead(self, tensors: Iterable[str]) -> None:
        """Fetch small tensors by several requests at once; where one fails none is tried again."""
        if self.part is None:
            return
        places = [self.source.where[name] for name in dict.fromkeys(tensors)]
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(partial(self.load, self.source), places))
        except CheckpointError as error:
            self.part = partial(_lost, error)
            raise

    def _load(self, place: Place) -> Tensor:
        assert self.part is not None
        entry = place.entry
        if entry.nbytes > SMALL or entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{entry.name} has {entry.nbytes} bytes: no gain")
        dtype, first = FLOAT_DTYPES[entry.dtype], len(self.source.shards[place.shard].raw)
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        data, _ = self.part(place.shard, first + entry.start, first + entry.end)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(entry.shape)


def _lost(error: CheckpointError, *_: Any) -> NoReturn:
    raise error


def open_remote(name: str, folder: Path) -> Remote:
    """The weights of a model whose `snapshot` is `folder`: by their headers, or in the cache.

    Raises CheckpointError where they cannot be had, or are no safetensors.
    """
    try:
        return Remote(open_source(folder), None)
    except (FlashNormError, OSError):
        part = partial(_part, name, folder.name)
    index, start = _index(name, folder.name), None
    try:
        start = part(SINGLE, 0, FIRST)
    except Missing:
        if index is None:
            raise CheckpointError(f"{name} has neither {SINGLE} nor {INDEX} on the hub") from None
    if index is not None and start is not None:
        raise CheckpointError(f"{name} has both {SINGLE} and {INDEX}, and readers differ")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        if start is not None:
            headers = [_header(part, SINGLE, start)]
        else:
            headers = list(pool.map(partial(_header, part), shard_names(index)))
    shards = dict(zip(shard_names(index), headers, strict=True))
    return Remote(made_of(folder, read_config(folder), index, shards), part)


def _index(name: str, commit: str) -> dict[str, Any] | None:
    try:
        return read_index(_fetched(name, INDEX, commit))
    except Missing:
        return None


def _header(part: Part, file: str, start: tuple[bytes, int] | None = None) -> Header:
    raw, size = start or part(file, 0, FIRST)
    length = header_bytes(Path(file), raw, size)
    if length > len(raw):
        raw += part(file, len(raw), length)[0]
    return parse_header(Path(file), raw[:length], size)


def _fetched(name: str, file: str, commit: str | None) -> Path:
    """A small file of a repository, in the hub's cache. Raises CheckpointError, Missing of one."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=commit))
    except Exception as error:
        raise _explained(name, file, error) from error


def _part(name: str, commit: str, file: str, start: int, end: int) -> tuple[bytes, int]:
    """Bytes `start` to `end` of a file, or to its end, and the size of all of it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    request: dict[str, Any] = {"headers": {**build_hf_headers(), **asked}, "timeout": PATIENCE}
    url = hf_hub_url(name, file, revision=commit)
    try:
        with get_session().stream("GET", url, follow_redirects=True, **request) as answer:
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            size = _size(name, file, answer, start, end)
            return _body(name, file, answer, min(end, size) - start), size
    except FlashNormError:
        raise
    except Exception as error:
        raise _explained(name, file, error) from error


def _size(name: str, file: str, answer: Any, start: int, end: int) -> int:
    """The size of the whole file, of an answer that is the part that was asked for."""
    found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status_code != 206 or found is None:
        raise CheckpointError(f"the hub sends {file} of {name} as a whole only")
    first, last, size = map(int, found.groups())
    if (first, last + 1) != (start, min(end, size)):
        raise CheckpointError(f"the hub sends another part of {file} of {name} than was asked for")
    return size


def _body(name: str, file: str, answer: Any, count: int) -> bytes:
    body = b""
    for chunk in answer.iter_bytes():
        body += chunk
        if len(body) > count:
            break
    if len(body) != count:
        raise CheckpointError(f"the hub sends {file} of {name} in another length than it says")
    return body


def _explained(name: str, file: str, error: Exception) -> CheckpointError:
    """What is said of an error of the hub's own library: what is missing and how to mend it."""
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{name} is gated: accept its terms at {where}/{name}, then sign in with hf auth login"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return CheckpointError(_unreached(name, file, where))
    if isinstance(error, errors.EntryNotFoundError):
        return Missing(f"{name} has no {file} on the hub: it is no checkpoint of transformers")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return CheckpointError(
            f"{name} is no local path, and {where} has no such model or does not show it: check "
            "the spelling, or sign in with hf auth login where it is private"
        )
    if isinstance(error, errors.HfHubHTTPError):
        code = getattr(error.response, "status_code", "?")
        return CheckpointError(f"{where} answers {code} for {file} of {name}: try again later")
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return CheckpointError(f"{file} of {name} could not be read from {where}: {first}")


def _unreached(name: str, file: str, where: str) -> str:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return (
            f"{file} of {name} is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask for it"
        )
    return (
        f"{name} is no local path, and {where} cannot be reached for its {file}: check the "
        "network, or name a local directory or GGUF file"
    )
