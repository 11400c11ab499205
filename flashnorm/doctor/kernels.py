"""The compiled kernels: whether they are there, right on this processor, and tuned for it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flashnorm
from flashnorm.doctor.checks import Check, Row

KERNELS = "kernels"
PATIENCE = 120.0  # seconds
COMPILERS = ("c++", "g++", "clang++")
REINSTALL = "pip install --force-reinstall --no-deps flashnorm"
FORCED = "FLASHNORM_CPU_ISA"


def _kernels() -> Iterator[Row]:
    from flashnorm.kernels.cpu.library import PATH

    if not PATH.exists():
        found = f"{PATH} is missing: models run on torch's own operations"
        yield Row(KERNELS, "library", found, "missing", _build())
        return
    yield Row(KERNELS, "library", str(PATH))
    done = _probe()
    if done.returncode != 0:
        yield Row(KERNELS, "self-test", _ended(done), "broken", _avoid(done.returncode))
        return
    yield from _rows(json.loads(done.stdout.splitlines()[-1]))


def _build() -> str:
    if any(map(shutil.which, COMPILERS)):
        return f"{REINSTALL} --no-binary flashnorm"
    return f"install a C++17 compiler (on Debian: apt-get install g++), then {REINSTALL}"


def _probe() -> subprocess.CompletedProcess[str]:
    """The probe, whose Python finds the package where this one did, and writes nothing."""
    paths = [str(Path(flashnorm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    told = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "flashnorm.doctor.probe"],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def _ended(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the kernels end the process: {signal.Signals(-done.returncode).name}"
    last = next(reversed(done.stderr.strip().splitlines()), "")
    return f"the kernels do not run: {last}"


def _avoid(code: int) -> str:
    if os.environ.get(FORCED):
        return f"unset {FORCED}"
    return f"{FORCED}=portable avoids it; {REINSTALL}" if code < 0 else REINSTALL


def _rows(found: dict[str, Any]) -> Iterator[Row]:
    if why := found.get("why_not"):
        yield Row(KERNELS, "self-test", why, "broken", REINSTALL)
        return
    yield from _instruction_sets(found)
    yield Row(KERNELS, "threads", found["threads"])
    wrong = [f"{isa}: {what}" for isa, faults in found["wrong"].items() for what in faults]
    if wrong:
        mend = f"{REINSTALL}; if it stays, report it with this table"
        yield Row(KERNELS, "self-test", "; ".join(wrong), "broken", mend)
    else:
        said = f"right on {', '.join(found['wrong'])}: products against the reference"
        yield Row(KERNELS, "self-test", said)


def _instruction_sets(found: dict[str, Any]) -> Iterator[Row]:
    lacking = [name for name in found["built"] if name not in found["supported"]]
    said = f"{found['used']} is used; this processor has {', '.join(found['supported'])}"
    said += f"; not {', '.join(lacking)}" if lacking else ""
    best = found["supported"][0]
    if found["used"] != best and os.environ.get(FORCED):
        forced = f"{said}; {FORCED} forces {found['used']}"
        yield Row(KERNELS, "instructions", forced, "note", f"unset {FORCED}")
    else:
        yield Row(KERNELS, "instructions", said)


def _tuned() -> Iterator[Row]:
    from flashnorm.kernels import measurements
    from flashnorm.kernels.cpu import crossovers

    file = measurements.path(crossovers.CACHE, crossovers.FILE)
    if file is None:
        yield Row(KERNELS, "tuning", f"{crossovers.CACHE}=off: what is shipped is used", "note")
    elif held := crossovers.measured():
        sets = ", ".join(held)
        yield Row(KERNELS, "tuning", f"measured for {sets} with so many threads: {file}")
    else:
        found = f"{file} has nothing for this machine and its threads: what is shipped is used"
        yield Row(KERNELS, "tuning", found, "missing", "flashnorm tune")


CHECKS = (
    Check(KERNELS, "library", _kernels, needed=True),
    Check(KERNELS, "tuning", _tuned),
)
