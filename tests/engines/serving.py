"""`transformers serve` as a process, asked over loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import flashnorm

ROOT = Path(flashnorm.__file__).parents[1]
SERVE = "from transformers.cli.transformers import main; main()"
BATCHES = ("--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64")
START = 180  # seconds


@contextmanager
def server(model: Path, *options: str, under: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a server of this model; `under`: what starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serve = [sys.executable, "-c", SERVE, "serve", str(model), "--device", "cpu", "--port", port]
    said = Path(tempfile.mkstemp(prefix="serve-", suffix=".log")[1])  # a pipe would fill
    with said.open("w") as log:
        child = subprocess.Popen(
            [*under, *serve, "--host", "127.0.0.1", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, child, said)
        yield address
    finally:
        _stop(child)
        said.unlink()


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Two interrupts: after the first, a server in batches waits for a thread without end."""
    for _ in range(2):
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=8)
            return
    os.killpg(child.pid, signal.SIGKILL)


def _wait(address: str, child: subprocess.Popen[bytes], said: Path) -> None:
    end = time.monotonic() + START
    while True:
        if child.poll() is not None:
            raise AssertionError(f"the server ended: {said.read_text()}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.2)


def complete(address: str, model: Path, prompt: str, tokens: int) -> tuple[str, int]:
    """The greedy text that follows a prompt, and of how many tokens it is."""
    with _ask(address, model, prompt, tokens, stream=False) as answer:
        found = json.load(answer)
    return found["choices"][0]["text"], found["usage"]["completion_tokens"]


def stream(address: str, model: Path, prompt: str, tokens: int) -> list[str]:
    """The same in the pieces in which it comes."""
    with _ask(address, model, prompt, tokens, stream=True) as answer:
        lines = [line.decode().strip() for line in answer]
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return [choice["text"] for event in events for choice in json.loads(event)["choices"]]


def _ask(address: str, model: Path, prompt: str, tokens: int, stream: bool) -> Any:
    asked = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "stream": stream}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({**asked, "temperature": 0.0}).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=120)
