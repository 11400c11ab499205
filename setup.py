"""Builds the CPU kernels: plain C++17, no torch, one library for all instruction sets.

With g++ or clang++; on Windows with clang-cl, which Visual Studio and LLVM bring. Without a
compiler the package installs all the same and runs on torch's own operations;
`flashnorm.kernels.cpu.calls.available()` says so. FLASHNORM_NO_KERNELS=1 leaves them out,
FLASHNORM_NEED_KERNELS=1 ends the build where they cannot be made (for wheels);
FLASHNORM_SANITIZE=1 builds them with the address and undefined-behaviour sanitizers (slow).

For which processor is what `sysconfig.get_platform()` says, so that a cross build is one for which
_PYTHON_HOST_PLATFORM, CC and CXX are set, as cibuildwheel and others do.
"""

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("flashnorm/kernels/cpu/csrc")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno", "-g0", "-Wall", "-Wextra"]
# The compiler's own AVX-512 headers would be warned about.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# The operators are called by torch, which expects them.
THROWING = ["-fexceptions", "-frtti"]
# The same for clang-cl, which has exceptions anyway and exports what says so.
CLANG_CL = ["/std:c++17", "/O2", "/clang:-O3", "/clang:-ffp-contract=fast"]
CLANG_CL += ["/clang:-fno-trapping-math", "/clang:-fno-math-errno", "/clang:-Wno-uninitialized"]
# For `make sanitize`: a report of either sanitizer ends the process.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZE += ["-fno-omit-frame-pointer", "-O1", "-g"]
LAST = SANITIZE if os.environ.get("FLASHNORM_SANITIZE") else []
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = {"avx2": AVX2, "avx512": AVX512, "avx512vnni": [*AVX512, "-mavx512vnni"]}
X86["avx512bf16"] = [*AVX512, "-mavx512bf16"]
AMX = {"amx": [*X86["avx512bf16"], "-mamx-tile", "-mamx-bf16"]}  # Linux alone is asked for tiles
ARM = {"neon": []}
# By the end of a platform's name: linux-x86_64, macosx-11.0-arm64, win-amd64.
SETS = {"x86_64": X86 | AMX, "amd64": X86, "aarch64": ARM, "arm64": ARM}
# What an instruction set adds to.
NEEDS = {"avx512vnni": "avx512", "avx512bf16": "avx512vnni", "amx": "avx512bf16"}


def machine(plat_name: str) -> str:
    """The processor of a platform; a universal2 Python builds for the one that it runs on."""
    name = plat_name.rpartition("-")[2]
    return platform.machine() if name == "universal2" else name


class BuildKernels(build_ext):
    """Every instruction set is a file; one that the compiler does not know is left out."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = ".dll" if self.plat_name.startswith("win") else ".so"
        return str(Path(*fullname.split("."))) + suffix  # loaded by name: no Python ABI in it

    def build_extension(self, ext: Extension) -> None:
        self.with_clang_cl = self.compiler.compiler_type == "msvc"
        if self.with_clang_cl:
            self._use_clang_cl()
        known = SETS.get(machine(self.plat_name), {})
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            parts = {isa: pool.submit(self._compile, f"isa_{isa}", known[isa]) for isa in known}
            objects = self._compile("isa_portable", [])
            made = {isa: part.result() for isa, part in parts.items() if not part.exception()}
        for isa in parts.keys() - made.keys():
            print(
                f"flashnorm: this compiler cannot build the {isa} kernels: {parts[isa].exception()}"
            )
        for isa, needed in NEEDS.items():
            if needed not in made:
                made.pop(isa, None)
        objects += [file for files in made.values() for file in files]
        objects += self._compile("library", [f"-DFLASHNORM_HAS_{isa.upper()}" for isa in made])
        objects += self._compile("thread_pool", [])
        objects += self._compile("operators", [] if self.with_clang_cl else THROWING)
        target = self.get_ext_fullpath(ext.name)
        last = LAST if self.with_clang_cl else [*LAST, "-pthread"]  # of its own before glibc 2.34
        self.compiler.link_shared_object(objects, target, extra_postargs=last, target_lang="c++")

    def _use_clang_cl(self) -> None:
        """Microsoft's own compiler does not know the prefetches and attributes of the sources."""
        found = shutil.which("clang-cl")
        if found is None:
            raise RuntimeError("the kernels need clang-cl on Windows: install LLVM")
        if not self.compiler.initialized:
            self.compiler.initialize(self.plat_name)
        self.compiler.cc = found

    def _compile(self, name: str, flags: list[str]) -> list[str]:
        source = [str(SOURCES / f"{name}.cpp")]
        depends = [str(path) for path in sorted(SOURCES.glob("*.h"))]
        flags = [*(CLANG_CL if self.with_clang_cl else FLAGS), *flags, *LAST]
        return self.compiler.compile(
            source, output_dir=self.build_temp, extra_postargs=flags, depends=depends
        )


class AnyPython(bdist_wheel):
    """The library is loaded with ctypes: one wheel serves every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2]) if not self.root_is_pure else super().get_tag()


KERNELS = Extension(
    "flashnorm.kernels.cpu._cpu",
    sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
    depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
    language="c++",
    optional=not os.environ.get("FLASHNORM_NEED_KERNELS"),
)

setup(
    ext_modules=[] if os.environ.get("FLASHNORM_NO_KERNELS") else [KERNELS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
