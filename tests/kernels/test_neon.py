"""The driver in C++ that holds NEON to float64 under an emulator; and it sees what is wrong."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from flashnorm.kernels.cpu.library import PATH
from tests.kernels import cases, neon

# What neither multiplies in tiles nor rounds x before: the driver has no bounds for that.
PLAIN = [isa for isa in cases.ISAS if isa in ("portable", "avx2", "avx512", "neon")]
# A part of a line, and what it must not be.
ROUNDED = "vaddq_u32(vaddq_u32(raw, vdupq_n_u32(0x7fff)), odd)"
BROKEN = {
    "bf16 is read as half of it": ("vec_neon.h", "bits), 16)", "bits), 15)"),
    "bf16 is cut and not rounded": ("vec_neon.h", ROUNDED, "raw"),
    "ties are rounded up": ("vec_neon.h", ROUNDED, "vaddq_u32(raw, vdupq_n_u32(0x8000))"),
    "NaN becomes infinity": ("vec_neon.h", "0x7fc00000", "0x7f800000"),
    "two sums change places": ("vec_neon.h", "v[0].v, v[1].v", "v[1].v, v[0].v"),
    "a row is read too far": ("skinny.h", "left >= D::lanes ?", "true ?"),
    "the mask is not added": ("attention.h", "s[t] += mask[t]", "s[t] += 0"),
    "pieces are joined as they are": ("attention.h", "one[i] * scale", "one[i]"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of a program for aarch64."""
    if isinstance(said := neon.compiler(), str):
        pytest.skip(said)
    return neon.build(tmp_path_factory.mktemp("neon")).parent


@pytest.mark.slow
def test_neon_computes_what_float64_computes(built):
    if isinstance(said := neon.emulator(), str):
        pytest.skip(f"compiled, but not run: {said}")
    for isa in ("neon", "portable"):
        done = neon.run(built / "alone", isa)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{isa}: ")


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_seen(fault, built, tmp_path):
    if isinstance(said := neon.emulator(), str):
        pytest.skip(f"compiled, but not run: {said}")
    name, right, wrong = BROKEN[fault]
    sources, copy = tmp_path / "csrc", tmp_path / "built"
    shutil.copytree(built, copy)
    shutil.copytree(neon.SOURCES, sources)
    text = (sources / name).read_text()
    assert text.count(right) == 1, "the line is another one by now"
    (sources / name).write_text(text.replace(right, wrong))
    done = neon.run(neon.build(copy, sources, ("isa_neon",)))
    assert done.returncode not in (0, 2), done.stdout


@cases.compiled
def test_the_driver_holds_the_kernels_of_this_machine_as_well(tmp_path):
    """Its bounds and its own sums are right, then: Python's tests hold these kernels too."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path / "alone"
    options = ["-std=c++17", "-O2", f"-I{neon.SOURCES}", *neon.CONSTANTS]
    places = [str(neon.HERE / "alone.cpp"), str(PATH), f"-Wl,-rpath,{PATH.parent}"]
    subprocess.run(["g++", *options, *places, "-o", str(program)], check=True)
    assert PLAIN
    for isa in PLAIN:
        done = subprocess.run([program, isa], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{isa}: ")
