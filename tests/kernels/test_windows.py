"""Threads of a runtime with LLVM's entry points alone; and the library of Windows, under Wine."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from flashnorm.kernels.cpu.library import PATH
from tests.kernels import cases, neon, windows

COMPILE = ["g++", "-std=c++17", "-O2", f"-I{neon.SOURCES}", "-pthread"]


@cases.compiled
def test_threads_are_started_by_kmpc_as_well(tmp_path):
    """On a runtime of a few lines; `python -m tests.kernels.windows` takes Intel's as well."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path / "kmpc"
    places = [str(neon.HERE / "kmpc.cpp"), str(PATH), f"-Wl,-rpath,{PATH.parent}", "-ldl"]
    subprocess.run([*COMPILE, *places, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 threads share every call\n"


@pytest.mark.slow
def test_the_library_of_windows_computes_what_float64_computes(tmp_path):
    for said in (windows.compiler(), windows.emulator()):
        if isinstance(said, str):
            pytest.skip(said)
    target = windows.build(tmp_path)
    for isa in windows.PLAIN:
        done = windows.run(target / "alone.exe", isa)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{isa}: ")
    done = windows.run(target / "kmpc.exe")
    assert done.returncode == 0, done.stderr
