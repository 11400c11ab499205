"""A directory that is named by a URL: an object store, reached through fsspec.

Objects are read by ranges and uploaded whole; an upload appears when it is complete. Credentials,
servers and regions are what fsspec finds in the environment of the process, so that a `Remote` that
is sent to another machine holds none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from flashnorm.errors import CheckpointError, FlashNormError

CHUNK_BYTES = 16 << 20
BEAT = 0.2  # seconds between two reports of an upload
AT_ONCE = 4  # chunks in memory while an object is downloaded
# Where file systems say which version of an object this is; the first one found counts.
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
)
# Names of errors of their libraries, which are not imported here, and what mends them.
MENDS = {
    "NoCredentialsError": "give credentials, by the environment or the files of the store's tools",
    "PartialCredentialsError": "the credentials are not complete",
    "PermissionError": "the store refuses these credentials",
    "GatedRepoError": "accept the model's terms on the hub, then sign in with hf auth login",
}

Report = Callable[[int], None]
Facts = tuple[int, Any]  # the size of a file, and what changes whenever its content does


@dataclass(frozen=True)
class Remote:
    """The directory at `url`; nothing is asked of it before a method is called.

    Every method raises CheckpointError where the store cannot be reached or refuses, with its URL.
    """

    url: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def listing(self) -> set[str]:
        """Every file below, by its path from here; CheckpointError for a path that leaves."""
        with explained(self.url):
            fs, root = _connected(self.url)
            try:
                found = fs.find(root, detail=True)
            except FileNotFoundError:
                return set()
        files = (path for path, info in found.items() if not _is_directory(path, info))
        return {self._below(root, path) for path in files}

    def facts(self, name: str) -> Facts:
        """Size and version of a file as it is now; a listing may say the version otherwise."""
        with explained(f"{self.url}/{name}"):
            fs, root = _connected(self.url)
            return _facts(fs.info(f"{root}/{name}"))

    def read(self, name: str, start: int, length: int) -> bytearray:
        """`length` bytes from `start` on."""
        if not length:
            return bytearray()
        with explained(f"{self.url}/{name}"):
            fs, root = _connected(self.url)
            data = fs.cat_file(f"{root}/{name}", start=start, end=start + length)
        if len(data) != length:
            raise CheckpointError(
                f"{self.url}/{name} gave {len(data)} bytes where {length} were asked for"
            )
        return bytearray(data)

    def download(self, name: str, size: int, path: Path) -> None:
        """Write a file of `size` bytes to `path`, several chunks at a time."""

        def fetch(start: int) -> None:
            data = self.read(name, start, min(CHUNK_BYTES, size - start))
            with open(path, "r+b") as file:
                file.seek(start)
                file.write(data)

        path.write_bytes(b"")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(fetch, start) for start in range(0, size, CHUNK_BYTES)]:
                done.result()

    def upload(self, path: Path, name: str, report: Report) -> None:
        """Write the local file `path` here; reports as many bytes as it has, from this thread.

        An interrupt waits for the end of the upload.
        """
        size, sent, told = path.stat().st_size, _Sent(), 0
        with ThreadPoolExecutor(1) as pool:
            upload = pool.submit(self._put, path, name, sent)
            while not wait([upload], BEAT).done:
                count = min(sent.count, size) - told
                told += count
                report(count)
            upload.result()
        if (found := self.facts(name)[0]) != size:
            raise CheckpointError(f"{self.url}/{name} has {found} bytes, {size} were uploaded")
        report(size - told)

    def _put(self, path: Path, name: str, sent: _Sent) -> None:
        with explained(f"{self.url}/{name}"):
            fs, root = _connected(self.url)
            fs.put_file(str(path), f"{root}/{name}", callback=_callback(sent))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with explained(f"{self.url}/{name}"):
            fs, root = _connected(self.url)
            fs.pipe_file(f"{root}/{name}", data)

    def remove(self, name: str) -> None:
        with explained(f"{self.url}/{name}"):
            fs, root = _connected(self.url)
            fs.rm_file(f"{root}/{name}")

    def _below(self, root: str, path: str) -> str:
        name = path.removeprefix(root).lstrip("/")
        if not name:
            raise CheckpointError(f"{self.url} is a file, not a directory")
        plain = PurePosixPath(name).as_posix() == name and "\\" not in name
        if not plain or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise CheckpointError(f"{self.url} holds {name!r}, which is not a plain path")
        return name


def place_of(name: str) -> Path | Remote:
    """What a path or a URL names; `file:` is a path. Raises CheckpointError for other names."""
    scheme, mark, rest = name.partition("://")
    if not mark or len(scheme) < 2:
        return Path(os.path.abspath(name))
    if scheme in ("file", "local"):
        return Path(os.path.abspath(rest))
    if "::" in name or not rest.strip("/") or ".." in rest.split("/"):
        raise CheckpointError(f"{name} names no directory of a store: give scheme://place/name")
    return Remote(name.rstrip("/"))


def _is_directory(path: str, info: dict[str, Any]) -> bool:
    """Stores have none, but some tools leave an empty object in the place of one."""
    return info.get("type") == "directory" or (path.endswith("/") and not info.get("size"))


def _facts(info: dict[str, Any]) -> Facts:
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return int(info["size"]), version


@lru_cache(maxsize=8)
def _connected(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; nothing that it lists is kept."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise CheckpointError(f"{url} needs fsspec: pip install 'flashnorm[remote]'") from None
    try:
        fs, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise CheckpointError(
            f"{url} needs a package that is not here ({error}): pip install 'flashnorm[remote]', "
            "or the fsspec package of this store"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{url} cannot be read: {error}") from None
    if hasattr(fs, "max_concurrency"):
        fs.max_concurrency = AT_ONCE  # parts of an upload that are in memory, 50 MB each for S3
    return fs, root.rstrip("/")


class _Sent:
    """Bytes of an upload, counted by the store's own thread, which no error of ours may end."""

    def __init__(self) -> None:
        self.count = 0


def _callback(sent: _Sent) -> Any:
    from fsspec.callbacks import Callback

    class Told(Callback):
        def relative_update(self, inc: int = 1) -> None:
            sent.count += inc

    return Told()


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Every error of a store as a CheckpointError of one line that names the URL."""
    try:
        yield
    except FlashNormError:
        raise
    except Exception as error:
        kind = type(error).__name__
        said = next(iter(str(error).strip().splitlines()), "")
        mend = next((MENDS[t.__name__] for t in type(error).__mro__ if t.__name__ in MENDS), "")
        text = f"{url}: the store answered {kind}{': ' if said else ''}{said}"
        raise CheckpointError(f"{text}; {mend}" if mend else text) from error
