"""Every kernel compiled for GPUs that are not there: registers, shared memory, spills.

How many registers a kernel takes depends on the version of triton. There is a table for each that
is tested with, `compiled-VERSION.json`, written by `python -m flashnorm.kernels.gpu.compiled FILE`;
figures are compared where one is of the triton that is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLES = {
    table["triton"]: table["targets"]
    for table in (json.loads(path.read_text("utf-8")) for path in HERE.glob("compiled-*.json"))
}
VERSIONS = ("3.6.0", "3.9.0")  # that of the machines with a GPU, and that of `make venv`
# Bytes of shared memory that a program may have (CUDA programming guide, per thread block).
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
# One of each kernel, where most is kept in registers.
SOME = (
    r"^(skinny bf16 (rms three|layer glu) M=(1|64)|gemm bf16 rms (one|glu) M=4096"
    r"|finish_splits bf16 rms split M=16|skinny fp32 rms\*gain one M=64"
    r"|(row_scale|add_stats|normalize) bf16 layer|gate bf16 rms silu)$"
)
CODE = """
import json, re, sys
from flashnorm.kernels.gpu import compiled
only = re.compile(sys.argv[1])
print(json.dumps({f"sm_{i}": compiled.table(i, only) for i in compiled.TARGETS}))
"""


def compiled_again(only: str) -> dict[str, dict[str, dict[str, int]]]:
    """In a process that does not interpret kernels, whatever this one does."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, only],
        cwd=HERE.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_fits(target: str, kernels: dict[str, dict[str, int]]) -> None:
    assert kernels
    for name, used in kernels.items():
        assert used["spilled"] == 0, (target, name, used)
        assert used["shared"] <= SHARED[target], (target, name, used)
        assert 0 < used["registers"] <= 255, (target, name, used)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", SHARED)
def test_nothing_in_the_table_spills(version, target):
    assert_fits(target, TABLES[version][target])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_table_has_every_kernel_norm_and_dtype(version):
    for target in SHARED:
        words = {tuple(name.split()[:3]) for name in TABLES[version][target]}
        norms = {"rms", "rms*gain", "layer", "dyt", "none+residual"}
        for dtype in ("fp32", "bf16", "fp16"):
            for kernel in ("skinny", "finish_splits", "gemm"):
                assert {norm for k, d, norm in words if (k, d) == (kernel, dtype)} == norms
            for kernel in ("row_scale", "add_stats", "gate"):
                assert {(kernel, dtype, "rms"), (kernel, dtype, "layer")} <= words
            assert ("normalize", dtype, "dyt") in words


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("only", [SOME, pytest.param("", marks=pytest.mark.slow)])
def test_the_table_is_what_the_kernels_compile_to(only):
    import triton

    again = compiled_again(only)
    written = TABLES.get(triton.__version__)
    for target, kernels in again.items():
        assert_fits(target, kernels)
        for table in TABLES.values():
            assert set(kernels) <= set(table[target])
        if written:
            assert kernels == {name: written[target][name] for name in kernels}
            assert only or kernels == written[target]
