"""Builds the CPU kernels: plain C++17, no torch, one library for all instruction sets.

Without a C++ compiler the package installs all the same and runs on torch's own operations;
`flashnorm.kernels.cpu.available()` says so. FLASHNORM_NO_KERNELS=1 leaves them out;
FLASHNORM_SANITIZE=1 builds them with the address and undefined-behaviour sanitizers (slow).
"""

import os
import platform
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
# For `make sanitize`: a report of either sanitizer ends the process.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZE += ["-fno-omit-frame-pointer", "-O1", "-g"]
LAST = SANITIZE if os.environ.get("FLASHNORM_SANITIZE") else []
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = {"avx2": AVX2, "avx512": AVX512, "avx512vnni": [*AVX512, "-mavx512vnni"]}
X86["avx512bf16"] = [*AVX512, "-mavx512bf16"]
X86["amx"] = [*X86["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
SETS = {
    "x86_64": X86,
    "AMD64": X86,
    "aarch64": {"neon": []},
    "arm64": {"neon": []},
}


class BuildKernels(build_ext):
    """Every instruction set is a file; one that the compiler does not know is left out."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # loaded by name: no Python ABI in it

    def build_extension(self, ext: Extension) -> None:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            known = SETS.get(platform.machine(), {})
            parts = {isa: pool.submit(self._compile, f"isa_{isa}", known[isa]) for isa in known}
            objects = self._compile("isa_portable", [])
            made = {isa: part.result() for isa, part in parts.items() if not part.exception()}
        for isa in parts.keys() - made.keys():
            print(
                f"flashnorm: this compiler cannot build the {isa} kernels: {parts[isa].exception()}"
            )
        if "avx512" not in made:
            made.pop("avx512vnni", None)  # which only adds to it
        if "avx512vnni" not in made:
            made.pop("avx512bf16", None)
        if "avx512bf16" not in made:
            made.pop("amx", None)  # which adds to that
        objects += [file for files in made.values() for file in files]
        objects += self._compile("library", [f"-DFLASHNORM_HAS_{isa.upper()}" for isa in made])
        objects += self._compile("thread_pool", [])
        objects += self._compile("operators", ["-fexceptions", "-frtti"])  # torch expects them
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, extra_postargs=LAST, target_lang="c++")

    def _compile(self, name: str, flags: list[str]) -> list[str]:
        source = [str(SOURCES / f"{name}.cpp")]
        depends = [str(path) for path in sorted(SOURCES.glob("*.h"))]
        return self.compiler.compile(
            source, output_dir=self.build_temp, extra_postargs=FLAGS + flags + LAST, depends=depends
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
    optional=True,
)

setup(
    ext_modules=[] if os.environ.get("FLASHNORM_NO_KERNELS") else [KERNELS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
