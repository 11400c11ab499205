"""Every kernel compiled for GPUs that are not there: registers, shared memory, spills.

How many registers a kernel takes depends on the version of triton. There is a table for each that
is tested with, `compiled-VERSION.json`, written by `python -m flashnorm.kernels.gpu.compiled FILE`;
figures are compared where one is of the triton that is installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    r"|skinny bf16 rms split M=16|skinny fp32 rms\*gain one M=64"
    r"|packed bf16 (rms\*gain|layer) int4/128 (three M=1|glu M=64)"
    r"|(row_scale|add_stats|normalize) bf16 layer|gate bf16 rms silu)$"
)
CODE = """
import json, re, sys
from flashnorm.kernels.gpu import compiled
only = re.compile(sys.argv[1])
print(json.dumps({f"sm_{i}": compiled.table(i, only) for i in compiled.TARGETS}))
"""


def compiled_again(only: str) -> dict[str, dict[str, dict[str, int]]]:
    return in_another_process(CODE, only)


def in_another_process(code: str, *arguments: str) -> Any:
    """What code prints as JSON in one that does not interpret kernels, whatever this one does."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
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
            for kernel in ("skinny", "gemm"):
                assert {norm for k, d, norm in words if (k, d) == (kernel, dtype)} == norms
            for kernel in ("row_scale", "add_stats", "gate"):
                assert {(kernel, dtype, "rms"), (kernel, dtype, "layer")} <= words
            assert ("normalize", dtype, "dyt") in words
            packed = {name.split()[3] for name in TABLES[version][target] if name[:6] == "packed"}
            assert ("packed", dtype, "layer") in words
            assert {form.partition("/")[0] for form in packed} == {"int8", "int4", "fp8"}
            assert {("attend", dtype, mask) for mask in ("absent", "bool", "added")} <= words


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


# Kernels that start before the one in front of them has ended, and may not read what it makes.
EARLY = (
    r"^(skinny bf16 (rms|layer|rms\*gain|none\+residual) (one|three|glu|split) M=(1|16|64)"
    r"|packed bf16 (rms\*gain|layer) .* M=(1|16|64)"
    r"|attend bf16 (absent|bool) heads=[14] width=128)$"
)
INSTRUCTIONS = """
import json, re, sys
from flashnorm.kernels.gpu import compiled
only, said = re.compile(sys.argv[1]), re.compile(sys.argv[2])

def copies(step):
    "How many of 16 bytes each thread needs for the weights of all stages, if it has weights."
    if "w0" not in step.arguments:
        return 0
    tile = {name: step.arguments[name] for name in ("COLUMNS", "DEPTH", "STAGES")}
    halves = 1 if step.arguments["ACTIVATION"] is None else 2
    size = step.arguments["w0"].element_size()
    each = 2 if step.arguments.get("FORMAT") == "int4" else 1
    stage = tile["COLUMNS"] * tile["DEPTH"] // each * halves * size
    return stage // (512 * step.warps) * tile["STAGES"]

print(json.dumps({
    f"sm_{i}": {
        name: [copies(step), said.findall(compiled.compile_step(step, i).asm["ptx"])]
        for name, step in compiled.every_step(device) if only.search(name)
    } for i, device in compiled.TARGETS.items()
}))
"""
MEMORY = r"\b(?:ld|st|atom|red)\.global[.\w]*|\bcp\.async\.c[ag]\.[^;]*"
EARLIER = r"\bprefetch\.global\.L2\b|\bgriddepcontrol\.\w+"


@pytest.fixture(scope="module")
def instructions() -> dict[str, dict[str, tuple[int, list[str]]]]:
    """What the kernels do with memory, in order, and how many wide copies the weights take."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return in_another_process(INSTRUCTIONS, EARLY, f"{MEMORY}|{EARLIER}")


def test_on_hopper_nothing_is_read_before_the_wait_but_asked_for(instructions):
    assert len(instructions["sm_90"]) > 30
    for name, (_, found) in instructions["sm_90"].items():
        at = found.index("griddepcontrol.wait")
        assert found.count("griddepcontrol.wait") == 1, name
        assert found[at + 1] == "griddepcontrol.launch_dependents", name
        assert at == found.count("prefetch.global.L2"), name
        assert (at > 0) == name.startswith(("skinny", "packed")), name


def test_older_cards_run_the_kernels_without_that(instructions):
    assert len(instructions["sm_80"]) == len(instructions["sm_90"])
    for name, (_, found) in instructions["sm_80"].items():
        assert found, name
        assert not [each for each in found if re.match(EARLIER, each)], name


def test_weights_are_copied_16_bytes_at_a_time(instructions):
    for target, kernels in instructions.items():
        for name, (needed, found) in kernels.items():
            wide = [each for each in found if re.search(r"cp\.async\.cg.*\b0x10\b", each)]
            assert len(wide) >= needed, (target, name)
            # 64 rows leave no registers for steps that give every thread 16 bytes of packed ones.
            some = name.startswith("skinny") or (name.startswith("packed") and "M=64" not in name)
            assert (needed > 0) == some or "M=64" in name, name
