"""The library of Windows, compiled by clang for it and run under Wine.

`python -m tests.kernels.windows TARGET` builds the DLL and two drivers into TARGET and runs them:
tests/kernels/alone.cpp on every instruction set that it has bounds for, and tests/kernels/kmpc.cpp,
how threads of Intel's OpenMP runtime are started; with the path of a libiomp5md.dll as a second
argument also on that one. It exits with 1 where a result is wrong, and with 0 and a line that says
what is missing where there are no tools. Wheels are built by clang-cl, which takes the same code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kernels import neon

HERE, SOURCES = neon.HERE, neon.SOURCES
# What is known of g++ for Windows: it does not align AVX registers that it puts on the stack.
CLANG, LINKER = "clang++", "x86_64-w64-mingw32-g++-posix"
HEADERS = Path("/usr/lib/gcc/x86_64-w64-mingw32")
HOW = "apt install clang g++-mingw-w64-x86-64 wine64 wine"
NOT_THERE = ("-fPIC", "-fvisibility=hidden", "-Wno-maybe-uninitialized")
PLAIN = ("portable", "avx2", "avx512")  # what alone.cpp has bounds for
# Wine has no function that tells where processors lie.
WINE = {"WINEDEBUG": "-all", "KMP_AFFINITY": "disabled"}


def compiler() -> list[str] | str:
    """How to compile for Windows, or why nothing here does."""
    headers = sorted(HEADERS.glob("*-posix/include/c++"))
    if not (shutil.which(CLANG) and shutil.which(LINKER) and headers):
        return f"nothing here compiles for Windows: {HOW}"
    places = [headers[-1], headers[-1] / "x86_64-w64-mingw32", headers[-1] / "backward"]
    command = [CLANG, "--target=x86_64-w64-mingw32", "-nostdinc++", "-D_USE_MATH_DEFINES"]
    return [*command, *(option for place in places for option in ("-isystem", str(place)))]


def emulator() -> list[str] | str:
    """What to put before a program of Windows, or why nothing here runs one."""
    return ["wine"] if shutil.which("wine") else f"nothing here runs programs of Windows: {HOW}"


def build(target: Path) -> Path:
    """The DLL and both drivers in `target`. Raises RuntimeError with what the compiler says."""
    command, made = compiler(), neon.recipe()
    assert not isinstance(command, str), command
    target.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in made["FLAGS"] if flag not in NOT_THERE]
    sets = made["SETS"]["amd64"]
    for isa in ("portable", *sets):
        own = [*flags, *sets.get(isa, [])]
        neon.compile_one(command, own, SOURCES / f"isa_{isa}.cpp", target)
    has = [f"-DFLASHNORM_HAS_{isa.upper()}" for isa in sets]
    neon.compile_one(command, [*flags, *has], SOURCES / "library.cpp", target)
    neon.compile_one(command, flags, SOURCES / "thread_pool.cpp", target)
    neon.compile_one(command, [*flags, *made["THROWING"]], SOURCES / "operators.cpp", target)
    objects = sorted(map(str, target.glob("*.o")))
    neon.run_tool([LINKER, "-shared", "-static", *objects, "-o", str(target / "_cpu.dll")])
    for name in ("alone", "kmpc"):
        options = ["-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{SOURCES}", *neon.CONSTANTS]
        (target / name).mkdir(exist_ok=True)
        neon.compile_one(command, options, HERE / f"{name}.cpp", target / name)
        files = [str(target / name / f"{name}.o"), str(target / "_cpu.dll")]
        neon.run_tool([LINKER, "-static", *files, "-o", str(target / f"{name}.exe")])
    return target


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A driver's own output; it ends with 0 where all is right."""
    before = emulator()
    assert not isinstance(before, str), before
    # Wine keeps a directory as a Windows of its own.
    environment = os.environ | WINE | {"WINEPREFIX": str(program.parent.resolve() / "wine")}
    command = [*before, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def main() -> int:
    if isinstance(said := compiler(), str):
        print(f"not run: {said}")
        return 0
    target = build(Path(sys.argv[1]))
    print(f"compiled for Windows by {said[0]}", flush=True)
    if isinstance(said := emulator(), str):
        print(f"compiled, but not run: {said}")
        return 0
    calls = [("alone.exe", isa) for isa in PLAIN] + [("kmpc.exe", *sys.argv[2:])]
    codes = []
    for name, *arguments in calls:
        done = run(target / name, *arguments)
        print(done.stdout + done.stderr, end="", flush=True)
        codes.append(done.returncode)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
