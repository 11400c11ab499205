"""The package without a compiler: installed all the same, and it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import cases

ROOT = Path(__file__).parents[2]


def build(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    places = ["--build-temp", str(target / "temp"), "--build-lib", str(target)]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("environment", [{"CC": "false", "CXX": "false"}, {"CXX": "/no/such/c++"}])
def test_without_a_compiler_the_build_succeeds_and_makes_no_library(environment, tmp_path):
    done = build(tmp_path, **{"CC": environment["CXX"], **environment})
    assert done.returncode == 0, done.stderr
    assert 'building extension "flashnorm.kernels.cpu._cpu" failed' in done.stderr + done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_kernels_can_be_left_out(tmp_path):
    assert build(tmp_path, FLASHNORM_NO_KERNELS="1").returncode == 0
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
@cases.compiled
def test_a_compiler_without_an_instruction_set_leaves_only_it_out(tmp_path):
    """As an older one would: this one does not know -mavx512bf16."""
    script = tmp_path / "old-c++"
    script.write_text('#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1;; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    done = build(tmp_path, CC=str(script), CXX=str(script))
    assert done.returncode == 0, done.stderr
    names = (tmp_path / "flashnorm/kernels/cpu/_cpu.so").read_bytes()
    assert b"portable" in names
    assert b"avx512bf16\0" not in names
