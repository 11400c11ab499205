"""Peak memory: of a process as the system counts it, of a pass as torch's allocator does.

The allocator's events (torch.profiler, `profile_memory`) are exact to the byte and hold what lives
only inside an operation; torch runs the same code as without them, which a dispatch mode would not
let it. They do not hold what C++ takes from malloc itself: scratch of kernels and of oneDNN. The
growth of a process over the same pass holds that too, but counts pages, and not those that malloc
kept from before.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flashnorm.errors import FlashNormError

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
EVENT = "[memory]"  # torch's name for an allocation or a release
CHILD_SECONDS = 3600


def peak_allocated(run: Callable[[], object]) -> int:
    """The most bytes that `run` had allocated through torch on the CPU, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with _quiet_stderr(), torch.no_grad():
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as watch:
            kept = run()
        del kept
    events = watch.profiler.kineto_results.events() if watch.profiler is not None else ()
    changes = [(each.start_ns(), each.nbytes()) for each in events if each.name() == EVENT]
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Without the two lines that the profiler's C++ writes at every start and stop."""
    sys.stderr.flush()
    held, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(held, 2)
        os.close(held)
        os.close(nowhere)


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes that this process had in memory since it began, or since `forget_peak`.

    `getrusage` would not do: a process inherits its peak from the one that started it.
    """
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError as error:
        raise FlashNormError(f"resident memory is measured on Linux only: {error}") from error
    if found is None:
        raise FlashNormError(f"{STATUS} has no {name}: this kernel does not count it")
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Count the peak anew, after giving back what malloc keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    CLEAR.write_text("5")


def in_child(request: dict[str, Any]) -> dict[str, int]:
    """What `flashnorm.bench.child` measures in a process of its own.

    Raises FlashNormError with its last line where it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "flashnorm.bench.child", json.dumps(request)],
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        raise FlashNormError(said[-1] if said else f"the process ended with {done.returncode}")
    found: dict[str, int] = json.loads(lines[-1])
    return found
