"""The kernel tests on a library built with the address and undefined-behaviour sanitizers.

`python -m tests.kernels.sanitize TARGET` builds into TARGET, sees every instruction set report a
read that is out of bounds on purpose, and runs the tests. It exits with 1 if anything is reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = Path("flashnorm/kernels/cpu/_cpu.so")
RUNTIMES = ("libasan.so", "libstdc++.so")  # in this order before anything else
# Tests that build, or that compile with a compiler of their own.
LEFT_OUT = ("test_build.py", "test_neon.py", "test_sanitize.py")

# The storage of the last row of weights is given back before the kernel reads it.
OUT_OF_BOUNDS = """
import sys, torch
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu.library import use_isa
isa, name, rows, n = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
dtype = getattr(torch, name)
weight = torch.randn(rows, n).to(dtype)
weight.untyped_storage().resize_((rows - 1) * n * weight.element_size())
with use_isa(isa):
    cpu.run(Call(torch.randn(2, n).to(dtype), [weight]))
"""
# The end of a row that fills no vector, and rows that fill whole vectors, pairs and tiles.
SHAPES = (("float32", "9", "33"), ("bfloat16", "16", "64"), ("float16", "4", "64"))
ISAS = "from flashnorm.kernels.cpu.library import load; print(*load().supported())"


def runtimes() -> list[str] | str:
    """The shared libraries of the sanitizers, or why there are none."""
    if sys.platform != "linux":
        return "sanitizers are preloaded on Linux only"
    found = []
    for name in RUNTIMES:
        command = ["g++", f"-print-file-name={name}"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no g++ to ask for {name}: {error}"
        path = Path(said.strip())
        if not path.is_absolute() or path.read_bytes()[:4] != b"\x7fELF":
            return f"g++ has no shared {name}: its sanitizers are not installed"
        found.append(str(path))
    return found


def build(target: Path) -> Path:
    """The sanitized library, under `target`, by setup.py's own list of sources and flags."""
    places = ["--build-temp", str(target / "temp"), "--build-lib", str(target)]
    environment = os.environ | {"FLASHNORM_SANITIZE": "1", "CC": "gcc", "CXX": "g++"}
    command = [sys.executable, "setup.py", "build_ext", "--force", *places]
    (target / LIBRARY).unlink(missing_ok=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or not (target / LIBRARY).exists():
        raise RuntimeError(f"the sanitized library was not built:\n{done.stdout}{done.stderr}")
    return (target / LIBRARY).resolve()


def environment(library: Path) -> dict[str, str]:
    """What a process needs in order to run on the sanitized library."""
    preload = runtimes()
    assert not isinstance(preload, str), preload
    return os.environ | {
        "LD_PRELOAD": " ".join(preload),
        "FLASHNORM_CPU_LIBRARY": str(library),
        # Python and torch keep memory until the end on purpose.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def python(library: Path, *arguments: str, quiet: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(library),
        capture_output=quiet,
        text=True,
        timeout=3600,
    )


def supported(library: Path) -> list[str]:
    """The instruction sets that the sanitized library runs here."""
    done = python(library, "-c", ISAS)
    if done.returncode:
        raise RuntimeError(f"the sanitized library does not load:\n{done.stdout}{done.stderr}")
    return done.stdout.split()


def sees_out_of_bounds(library: Path, isa: str) -> bool:
    """Whether reads behind the weights end the process with a report of it."""
    done = [python(library, "-c", OUT_OF_BOUNDS, isa, *shape) for shape in SHAPES]
    return all(run.returncode and "heap-buffer-overflow" in run.stderr for run in done)


def run_tests(
    library: Path, *options: str, quiet: bool = False
) -> subprocess.CompletedProcess[str]:
    """tests/kernels, or a part of it; reports go to stderr whatever pytest captures."""
    left_out = [f"--ignore=tests/kernels/{name}" for name in LEFT_OUT]
    common = [
        "-m",
        "pytest",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *left_out,
    ]
    return python(library, *common, *(options or ("tests/kernels",)), quiet=quiet)


def main() -> int:
    if isinstance(said := runtimes(), str):
        print(said)
        return 1
    library = build(Path(sys.argv[1]))
    isas = supported(library)
    print(f"built {sys.argv[1]} with {library.name} for {', '.join(isas)}", flush=True)
    blind = [isa for isa in isas if not sees_out_of_bounds(library, isa)]
    if blind:
        print(f"a read out of bounds on purpose went unseen on {', '.join(blind)}")
        return 1
    print("a read out of bounds on purpose is reported on each of them", flush=True)
    return 1 if run_tests(library).returncode else 0


if __name__ == "__main__":
    sys.exit(main())
