"""The NEON kernels, compiled for aarch64 and run: under an emulator, or on such a processor.

`python -m tests.kernels.neon TARGET` builds tests/kernels/alone.cpp with the library into TARGET
and runs it: every dtype, norm and activation and attention against float64. It exits with 1 where
a result is wrong, and with 0 and a line that says what is missing where there are no tools.
"""

from __future__ import annotations

import importlib.util
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from flashnorm.verification.bounds import CONFIDENCE
from tests.kernels.bounds import SLOPE, STEPS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "flashnorm/kernels/cpu/csrc"
ARM = ("aarch64", "arm64")
LIBRARIES = "/usr/aarch64-linux-gnu"  # of the cross compiler
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
PARTS = ("isa_portable", "isa_neon", "library", "thread_pool")
HOW = "apt install g++-aarch64-linux-gnu qemu-user (or pip install ziglang for the compiler)"
CONSTANTS = [f"-DCONFIDENCE={CONFIDENCE}", f"-DSTEPS={STEPS}", f"-DSLOPE={SLOPE}"]


def compiler() -> list[str] | str:
    """How to compile for aarch64, or why nothing here does."""
    if platform.machine() in ARM and shutil.which("g++"):
        return ["g++"]
    if shutil.which("aarch64-linux-gnu-g++"):
        return ["aarch64-linux-gnu-g++"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
    return f"nothing here compiles for aarch64: {HOW}"


def emulator() -> list[str] | str:
    """What to put before a program of aarch64, or why nothing here runs one."""
    if platform.machine() in ARM:
        return []
    found = next(filter(shutil.which, EMULATORS), None)
    return [found] if found else f"nothing here runs programs of aarch64: {HOW}"


def recipe() -> dict[str, Any]:
    """The names of setup.py."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def flags() -> list[str]:
    """What setup.py compiles the kernels with."""
    made = recipe()
    return [*made["FLAGS"], *made["SETS"]["aarch64"]["neon"]]


def build(target: Path, sources: Path = SOURCES, parts: tuple[str, ...] = PARTS) -> Path:
    """The program, with `parts` of the kernels made anew from `sources`, the rest as it lies there.

    Raises RuntimeError with what the compiler says.
    """
    command = compiler()
    assert not isinstance(command, str), command
    target.mkdir(parents=True, exist_ok=True)
    for name in parts:
        compile_one(command, [*flags(), "-DFLASHNORM_HAS_NEON"], sources / f"{name}.cpp", target)
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{sources}", *CONSTANTS]
    compile_one(command, options, HERE / "alone.cpp", target)
    objects = [str(target / f"{name}.o") for name in (*PARTS, "alone")]
    run_tool([*command, "-static", "-pthread", *objects, "-o", str(target / "alone")])
    return target / "alone"


def compile_one(command: list[str], options: list[str], source: Path, target: Path) -> None:
    run_tool([*command, *options, "-c", str(source), "-o", str(target / f"{source.stem}.o")])


def run_tool(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def run(program: Path, isa: str = "neon") -> subprocess.CompletedProcess[str]:
    """The program's own output; it ends with 0 where all of its results are within their bounds."""
    before = emulator()
    assert not isinstance(before, str), before
    command = [*before, str(program), isa]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def linked(library: Path, program: Path) -> Path:
    """The driver as a program that loads a library of aarch64, such as that in a wheel."""
    command = compiler()
    assert not isinstance(command, str), command
    options = ["-std=c++17", "-O2", f"-I{SOURCES}", *CONSTANTS, str(HERE / "alone.cpp")]
    places = [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)]
    run_tool([*command, *options, *places])
    return program


def emulator_of_shared() -> list[str]:
    """What to put before a program that loads libraries: an emulator is told where those are."""
    before = emulator()
    assert not isinstance(before, str), before
    return [*before, "-L", LIBRARIES] if before else []


def main() -> int:
    if isinstance(said := compiler(), str):
        print(f"not run: {said}")
        return 0
    program = build(Path(sys.argv[1]))
    print(f"compiled for aarch64 by {' '.join(said)}", flush=True)
    if isinstance(said := emulator(), str):
        print(f"compiled, but not run: {said}")
        return 0
    done = run(program)
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
