"""A model hub on this machine: the few answers that its own client asks for, with every request.

`hub(folder)` serves the directories of `folder` as `org/NAME` and yields the requests, each a tuple
(method, file, first byte, last byte + 1), the range only where one was asked for.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0de"
_FILE = re.compile(r"/org/([\w.-]+)/resolve/([\w.-]+)/([\w.-]+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Hub(ThreadingHTTPServer):
    """`whole` sends files whole whatever is asked; `gated` and `private` refuse to show models;
    `moved` sends whoever asks for a part to another address, as hubs do."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple] = []
        self.whole = self.gated = self.private = self.moved = False
        self.lost: tuple[str, int] | None = None  # (file, how many of its parts are given)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def parts(self, suffix: str = ".safetensors") -> list[tuple]:
        """The requests for files of this suffix."""
        return [request for request in self.requests if request[1].endswith(suffix)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        asked = _FILE.fullmatch(self.path.removeprefix("/elsewhere"))
        if asked is None:
            return self._refuse(404, "RepoNotFound")
        name, commit, file = asked.groups()
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        part = (int(found[1]), int(found[2]) + 1) if found else ()
        self.server.requests.append((self.command, file, *part))
        if self.server.gated:
            return self._refuse(403, "GatedRepo")
        if self.server.private or not (self.server.folder / name).is_dir():
            return self._refuse(401, "RepoNotFound")
        if self.server.moved and part and not self.path.startswith("/elsewhere"):
            return self._move()
        path = self.server.folder / name / file
        if commit not in ("main", COMMIT) or not path.is_file():
            return self._refuse(404, "EntryNotFound")
        if self.server.lost and self.server.lost[0] == file and part:
            if self.server.lost[1] == 0:
                return self._refuse(503, "")
            self.server.lost = (file, self.server.lost[1] - 1)
        self._send(path.read_bytes(), part if part and not self.server.whole else None, body)
        return None

    def _move(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.server.url}/elsewhere{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, code: int, error: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data: bytes, part: tuple | None, body: bool) -> None:
        size = len(data)
        tag = hashlib.sha256(data).hexdigest()
        if part:
            data = data[part[0] : part[1]]
        self.send_response(206 if part else 200)
        if part:
            last = part[0] + len(data) - 1
            self.send_header("Content-Range", f"bytes {part[0]}-{last}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            try:
                self.wfile.write(data)
            except OSError:  # the client did not want all of it
                self.close_connection = True


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A hub with the models in `folder`, as org/NAME."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
