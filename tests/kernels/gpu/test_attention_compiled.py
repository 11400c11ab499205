"""Attention compiled for GPUs that are not there: no spills, and no kernel for a length alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.gpu.test_compiled import assert_fits

ROOT = Path(__file__).parents[3]
# dtype, heads of a group, features, mask
SOME = [
    ("bfloat16", 4, 128, "bool"),
    ("bfloat16", 8, 64, "none"),
    ("bfloat16", 1, 128, "none"),
    ("float32", 4, 128, "bool"),
]
ALL = [
    (dtype, heads, width, mask)
    for dtype in ("bfloat16", "float16", "float32")
    for heads in (1, 2, 4, 8, 16)
    for width in (64, 80, 128, 256)
    for mask in ("none", "bool", "added")
]
CODE = """
import json, sys, torch
from flashnorm.kernels.gpu import attention, compiled

def step(device, dtype, heads, width, mask, batch=1, length=4097):
    dtype = getattr(torch, dtype)
    def made(*size, dtype=dtype):
        return torch.empty(*size, dtype=dtype, device="meta")
    q, k = made(batch, 8 * heads, 1, width), made(batch, 8, length, width)
    mask = None if mask == "none" else made(batch, 1, 1, length)
    if mask is not None and sys.argv[2] == "bool":
        mask = mask.bool()
    return attention.attention_step(q, k, k, mask, 0.1, made(batch, 1, 8 * heads, width), device)

def seen(step):
    # What is compiled in: constants, and numbers that Triton looks at.
    found = {}
    for parameter in step.kernel.params:
        value = step.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            found[parameter.name] = value
        elif isinstance(value, int) and not parameter.do_not_specialize:
            found[parameter.name] = (value == 1, value % 16 == 0, value >= 2**31)
    return found

used = {}
for capability, device in compiled.TARGETS.items():
    for given in json.loads(sys.argv[1]):
        sys.argv[2] = given[3]
        made = step(device, *given)
        used.setdefault(f"sm_{capability}", {})[str(given)] = compiled.resources(made, capability)
sys.argv[2] = "bool"
alike = [
    seen(step(device, "bfloat16", 4, 64, "bool", *size))
    for size in ((1, 1), (1, 16), (1, 17), (1, 4096), (5, 300), (64, 8192))
]
print(json.dumps([used, [one == alike[0] for one in alike]]))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("given", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=len)
def test_nothing_spills_and_nothing_is_compiled_for_a_length(given):
    """In a process that does not interpret kernels, whatever this one does."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, json.dumps(given), ""],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used, alike = json.loads(done.stdout.splitlines()[-1])
    assert alike == [True] * 6
    for target, kernels in used.items():
        assert len(kernels) == len(given)
        assert_fits(target, kernels)
