"""Work spread over processes, where one that hangs or dies costs its own item only."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

GRACE = 20.0  # seconds between the alarm inside a worker and its end from outside


class Hung(BaseException):
    """Not an Exception, so that no code on the way takes it for one."""


def spread(
    work: Callable[[Any], Any], items: list, processes: int, limit: float
) -> Iterator[tuple[Any, Any, str]]:
    """(item, result, cause) as they are done; `cause` is empty where there is a result."""
    waiting, busy = list(reversed(items)), {}
    idle = [_start(work, limit) for _ in range(min(processes, len(items)))]
    while waiting or busy:
        while waiting and idle:
            worker, pipe = idle.pop()
            item = waiting.pop()
            pipe.send(item)
            busy[pipe] = (worker, item, time.monotonic() + limit + GRACE)
        for pipe in wait(list(busy), timeout=1.0) or _late(busy):
            worker, item, _ = busy.pop(pipe)
            try:
                result, cause = pipe.recv() if pipe.poll() else (None, f"no end in {limit:.0f} s")
            except EOFError:
                result, cause = None, "the process died"
            if cause and result is None and not cause.startswith("!"):
                worker.kill()
                idle.append(_start(work, limit))
            else:
                idle.append((worker, pipe))
            yield item, result, cause.removeprefix("!")
    for worker, _ in idle:
        worker.kill()


def _late(busy: dict) -> list[Connection]:
    now = time.monotonic()
    return [pipe for pipe, (_, _, end) in busy.items() if now > end]


def _start(work: Callable, limit: float):
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(work, theirs, limit), daemon=True
    )
    worker.start()
    theirs.close()
    return worker, ours


def _serve(work: Callable, pipe: Connection, limit: float) -> None:
    """Do what comes; a cause that begins with "!" leaves this process fit for more."""

    def hang(*_):
        raise Hung

    signal.signal(signal.SIGALRM, hang)
    while True:
        item = pipe.recv()
        signal.alarm(int(limit))
        try:
            result, cause = work(item), ""
        except Hung:
            result, cause = None, f"!no end in {limit:.0f} s"
        except Exception as error:
            result, cause = None, f"!{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        pipe.send((result, cause))
