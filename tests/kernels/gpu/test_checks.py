"""Run every `check_*.py` in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CHECKS = sorted(HERE.glob("check_*.py"))


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def interpreter_is_broken() -> bool:
    """Triton 3.6 asks numpy for the number in an array of one, which numpy 2.4 refuses."""
    return release("triton") < (3, 7) and release("numpy") >= (2, 4)


pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(check: Path, interpret: bool, *arguments: str) -> str:
    """The check in a process of its own, without whatever this one was told about pytest."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment |= {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    environment["FLASHNORM_GPU_CACHE"] = str(Path(os.devnull, "no-file"))
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(check), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.stem)
def test_in_the_interpreter(check):
    if interpreter_is_broken():
        pytest.skip("this triton's interpreter does not work with this numpy")
    assert " passed" in run(check, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.stem)
def test_on_the_gpu(check):
    assert " passed" in run(check, False)


def test_the_checks_are_here():
    assert len(CHECKS) >= 3
