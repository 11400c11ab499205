"""The package as users get it, in new environments: `python -m tests.packaging DIRECTORY`.

Builds the sdist, and the wheel from the sdist; checks both; installs the wheel where there is no
compiler and runs a module on its kernels; installs the sdist with a compiler, and without one;
builds the wheel of aarch64 with a cross compiler and runs its library under an emulator. It prints
times and sizes, and ends with 1 where a step fails. What is missing here is said and left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from flashnorm import extras
from tests.kernels import neon

ROOT = Path(__file__).parents[2]
MODULE = Path(__file__).with_name("plain_module.py")
THREE_LINES = """
import torch, flashnorm
model = torch.nn.Sequential(torch.nn.RMSNorm(64), torch.nn.Linear(64, 8)).eval()
print(flashnorm.acceleration(flashnorm.accelerate_(model, example_inputs=(torch.randn(1, 64),))))
"""
KERNELS = "from flashnorm.kernels.cpu.library import load; "
SAYS = KERNELS + "print(load() if isinstance(load(), str) else load().isa)"
CROSS = {
    "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    "CC": "aarch64-linux-gnu-gcc",
    "CXX": "aarch64-linux-gnu-g++",
    "FLASHNORM_NEED_KERNELS": "1",
}


def run(*command: object, within: Path = ROOT, **environment: str) -> str:
    """What a command says. Raises RuntimeError with all of it where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=within,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def bare(python: Path, *arguments: object, within: Path) -> str:
    """The same by a Python that finds nothing but itself: no compiler, no variables."""
    return run(
        "env", "-i", f"PATH={python.parent}", "OMP_NUM_THREADS=2", python, *arguments, within=within
    )


def timed(said: str, step: Callable[[], str]) -> None:
    start = time.perf_counter()
    found = step()
    print(f"{said}: {found} ({time.perf_counter() - start:.1f} s)", flush=True)


def only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    assert len(found) == 1, f"{len(found)} files {pattern} in {directory}"
    return found[0]


class Package:
    """The steps, in a directory of their own; `tools` is a Python that has build and twine."""

    def __init__(self, directory: Path, tools: Path) -> None:
        self.directory, self.tools = directory.resolve(), tools
        self.dist, self.elsewhere = self.directory / "dist", self.directory / "elsewhere"
        self.python = self.directory / "empty/bin/python"
        for made in (self.dist, self.elsewhere, self.directory / "aarch64"):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)

    def build(self) -> str:
        run(self.tools, "-m", "build", "--outdir", self.dist, ROOT, FLASHNORM_NEED_KERNELS="1")
        return ", ".join(f"{f.name} {f.stat().st_size / 1e6:.2f} MB" for f in self.dist.iterdir())

    def check(self) -> str:
        run(self.tools, "-m", "twine", "check", "--strict", *self.dist.iterdir())
        return "twine has nothing against them"

    def symbols(self) -> str:
        """The oldest manylinux that the wheel could run on, by what its library asks for."""
        if shutil.which("auditwheel", path=str(self.tools.parent)) is None:
            return "not looked at: no auditwheel"
        said = run(self.tools, "-m", "auditwheel", "show", only(self.dist, "*.whl"))
        return " ".join(said.split())

    def install(self) -> str:
        """The wheel and what it asks for, in an environment that has nothing else."""
        pip = (self.python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt")
        if not self.python.exists():
            run(sys.executable, "-m", "venv", self.directory / "empty")
            run(*pip, "torch")
        run(self.python, "-m", "pip", "uninstall", "-q", "-y", "flashnorm")
        run(*pip, only(self.dist, "*.whl"), within=self.elsewhere)
        installed = run(self.python, "-m", "pip", "list", "--format", "freeze").split()
        unwanted = [
            one for one in installed if one.split("==")[0] in extras.HF.keys() - {"filelock"}
        ]
        assert not unwanted, unwanted
        return f"{len(installed)} packages in all"

    def _sources(self, compiler: bool) -> None:
        pip = ("-m", "pip", "install", "-q", "--force-reinstall", "--no-deps")
        file = only(self.dist, "*.tar.gz")
        if compiler:
            run(self.python, *pip, file, within=self.elsewhere, FLASHNORM_NEED_KERNELS="1")
        else:
            bare(self.python, *pip, file, within=self.elsewhere)

    def works(self, *, kernels: bool = True) -> str:
        """A module, folded, proven, accelerated; and three lines, whose words are returned."""
        call = (MODULE, "kernels") if kernels else (MODULE,)
        assert bare(self.python, *call, within=self.elsewhere).endswith("fine\n")
        place = bare(
            self.python, "-c", "import flashnorm; print(flashnorm.__file__)", within=self.elsewhere
        )
        assert "site-packages" in place, f"another flashnorm was tried: {place}"
        said = bare(self.python, "-c", SAYS, within=self.elsewhere).strip()
        return (
            f"{said}; {bare(self.python, '-c', THREE_LINES, within=self.elsewhere).splitlines()[0]}"
        )

    def from_sources(self, *, compiler: bool) -> str:
        self._sources(compiler)
        return self.works(kernels=compiler)

    def command(self) -> str:
        """The console script of an installation without the extra that it needs."""
        script = self.python.with_name("flashnorm")
        done = subprocess.run([script, "inspect", "."], capture_output=True, text=True)
        assert done.returncode == 2, done.stdout
        return done.stderr.strip()

    def aarch64(self) -> str:
        """The wheel of another processor, by setup.py and the sdist alone, and its kernels."""
        if not shutil.which(CROSS["CXX"]) or isinstance(neon.emulator(), str):
            return f"not built: {neon.HOW}"
        target = self.directory / "aarch64"
        with tarfile.open(only(self.dist, "*.tar.gz")) as packed:
            packed.extractall(target, filter="data")
        sources = only(target, "flashnorm-*")
        run(self.tools, "-m", "build", "--wheel", "--outdir", target, sources, **CROSS)
        wheel = only(target, "*.whl")
        assert wheel.name.endswith("-py3-none-linux_aarch64.whl"), wheel.name
        with zipfile.ZipFile(wheel) as packed:
            library = packed.extract("flashnorm/kernels/cpu/_cpu.so", target)
        program = neon.linked(Path(library), target / "alone")
        said = [
            run(*neon.emulator_of_shared(), program, isa).strip() for isa in ("neon", "portable")
        ]
        return f"{wheel.name} {wheel.stat().st_size / 1e6:.2f} MB; {'; '.join(said)}"


def main() -> int:
    package = Package(
        Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(sys.executable)
    )
    steps: list[tuple[str, Callable[[], str]]] = [
        ("built", package.build),
        ("checked", package.check),
        ("the library", package.symbols),
        ("installed without a compiler", package.install),
        ("the wheel runs", package.works),
        ("the command without its extra", package.command),
        ("the sdist with a compiler", lambda: package.from_sources(compiler=True)),
        ("the sdist without one", lambda: package.from_sources(compiler=False)),
        ("for aarch64", package.aarch64),
    ]
    for said, step in steps:
        try:
            timed(said, step)
        except (RuntimeError, AssertionError) as error:
            print(f"{said}: FAILED\n{error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
