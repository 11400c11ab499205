"""What a dry run of the GPU benchmark leaves out, on a CPU all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import attending, operations
from benchmarks.gpu.variants import EACH_PART, WITHOUT
from flashnorm.bench.records import EAGER, OURS


def test_on_a_card_that_is_a_cpu_in_disguise(tmp_path):
    """What a dry run leaves out: captures, events, tuned compilers, kernels in the interpreter."""
    pytest.importorskip("triton", reason="there is no Triton here to interpret kernels")
    command = [sys.executable, "-m", "tests.bench.disguised", str(tmp_path)]
    stages = ["ceilings", "checks", "decode-llama", "prefill", "memory", "scaled", "float32"]
    stages += ["attention", "parts-llama"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["FLASHNORM_GPU_CACHE"] = str(tmp_path / "no-file")
    done = subprocess.run(
        [*command, *stages], env=environment, capture_output=True, text=True, timeout=600
    )
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert found["incomplete"] == {}, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.returncode == 0
    assert {row["way"] for row in found["stages"]["correctness"]} == {"skinny", "gemm", "matmul"}
    for row in found["stages"]["decode"]:
        assert row["wrong"] == {}
        assert set(row["failed"]) <= {"hub kernels"}
    assert found["stages"]["training"][0]["peak_bytes"] == {EAGER: 1, OURS: 1}
    (row,) = (r for r in found["stages"]["operations"] if r["shape"] == "576→960")
    assert set(row["microseconds"]) >= {operations.TRITON, operations.COMPILED}
    assert len(found["stages"]["attention"]) == len(attending.CASES) + 1
    for row in found["stages"]["attention"]:
        assert row["wrong"] == ""
        assert set(row["microseconds"]) >= {attending.OURS, attending.REPEATED}
    (row,) = (row for row in found["stages"]["decode"] if row["group"] == EACH_PART)
    assert set(row["milliseconds"]) >= set(WITHOUT)


STEP = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu.variants import Static

seen = []

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if "local_scalar" in str(function) or any(not t.is_cuda for t in given):
            seen.append(str(function))
        return result

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    variant = Static("static", model)
    prompt = torch.zeros(8, dtype=torch.long)
    cache, logits = variant.start(prompt, 4)
    with Watch():
        variant.step(logits.argmax(), cache)
print("asked for:", seen)
"""


def test_a_step_on_a_static_cache_can_be_captured():
    """It asks the device for no value and copies nothing from the host, on fake tensors."""
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA; `make gpu-env` has one")
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, timeout=300)
    assert "asked for: []" in done.stdout, done.stdout + done.stderr[-2000:]
