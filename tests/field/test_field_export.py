"""Accelerated models that leave the process: exported programs, and the original for a while."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import flashnorm
from tests.zoo import randomize_

from .test_field_states import IDS, SHAPE

WITHOUT = """
import sys
sys.modules["flashnorm"] = None
import torch
program = torch.export.load(sys.argv[1])
torch.save(program.module()(torch.load(sys.argv[2])), sys.argv[3])
"""


def blocks(dtype=torch.bfloat16):
    model = nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 8))
    randomize_(model, 0)
    return model.to(dtype).eval()


def llama():
    config = LlamaConfig(**SHAPE, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize_(model, 0)
    return model


def state(model):
    return [dict(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", ["fixed", "any"])
def test_field_an_exported_program_runs_without_flashnorm(tmp_path, dtype, length):
    model, x = blocks(dtype), torch.randn(4, 32).to(dtype)
    expected = copy.deepcopy(model)
    flashnorm.accelerate_(model, (x,))
    shapes = None if length == "fixed" else ({0: torch.export.Dim("length", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert not [n for n in program.graph.nodes if "flashnorm" in str(n.target)]
    program_file, given, found = (str(tmp_path / name) for name in ("p.pt2", "x.pt", "y.pt"))
    torch.export.save(program, program_file)
    torch.save(x, given)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, program_file, given, found],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(found), expected(x))


def test_field_an_accelerated_model_is_exported_to_onnx():
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs the package onnxscript")
    model = flashnorm.accelerate_(blocks(), (torch.randn(4, 32, dtype=torch.bfloat16),))
    with torch.no_grad():
        program = torch.onnx.export(
            model, (torch.randn(4, 32, dtype=torch.bfloat16),), dynamo=True, verbose=False
        )
    assert program is not None
    assert "flashnorm" not in str(program.model)


def test_field_inside_of_original_a_model_is_nothing_but_its_own_code():
    plain = llama()
    model = flashnorm.accelerate_(copy.deepcopy(plain))
    before = state(model)
    with torch.no_grad():
        model(IDS)  # dtypes are known from here on
        accelerated = model(IDS).logits
        with flashnorm.original(model) as same:
            assert same is model
            assert not any("forward" in vars(module) for module in model.modules())
            assert model.config._attn_implementation == plain.config._attn_implementation
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        after = state(model)
        assert all(
            one.keys() == other.keys() and one.get("forward") is other.get("forward")
            for one, other in zip(before, after, strict=True)
        )
        assert torch.equal(model(IDS).logits, accelerated)
    flashnorm.restore_(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_field_a_model_is_accelerated_again_after_an_error_inside_of_original():
    model = flashnorm.accelerate_(llama())
    before = state(model)
    with pytest.raises(KeyboardInterrupt), flashnorm.original(model):
        raise KeyboardInterrupt
    after = state(model)
    for one, other in zip(before, after, strict=True):
        assert one.get("forward") is other.get("forward")
    assert flashnorm.acceleration(model).fused


def test_field_original_is_scripted():
    model, x = blocks(torch.float32)[1:2], torch.randn(4, 32)
    flashnorm.accelerate_(model, (x,))
    with flashnorm.original(model), torch.no_grad():
        assert torch.equal(torch.jit.script(model)(x), model(x))


def test_field_original_refuses_what_it_cannot_undo():
    model = blocks()
    with pytest.raises(flashnorm.FlashNormError, match="was not accelerated"):
        flashnorm.original(model).__enter__()
    flashnorm.accelerate_(model, (torch.randn(4, 32, dtype=torch.bfloat16),))
    ours = model[1].forward
    model[1].forward = lambda x: ours(x)
    before = state(model)
    with pytest.raises(flashnorm.FlashNormError, match="was wrapped or replaced since"):
        flashnorm.original(model).__enter__()
    assert all(
        one.get("forward") is other.get("forward")
        for one, other in zip(before, state(model), strict=True)
    )


def test_field_a_saved_program_of_our_own_operation_loads_once_it_is_imported():
    """`flashnorm.functional` used by hand stays one operation: documented, with the import."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 32))

        def forward(self, x):
            return flashnorm.functional.rms_norm_linear(x, self.weight)

    with torch.no_grad():
        program = torch.export.export(Block(), (torch.randn(2, 32),))
    kept = io.BytesIO()
    torch.export.save(program, kept)
    kept.seek(0)
    code = (
        "import sys, io, torch, flashnorm.functional\n"
        "torch.export.load(io.BytesIO(sys.stdin.buffer.read()))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=kept.read(), capture_output=True)
    assert done.returncode == 0, done.stderr
