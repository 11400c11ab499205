"""The commands on a GGUF file."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from flashnorm.bench.models import open_model, parameter_bytes, token_bytes
from flashnorm.cli import app
from flashnorm.errors import FlashNormError
from flashnorm.quantized.packed_tensor import PackedTensor
from tests.gguf import files
from tests.gguf.files import Q


@pytest.fixture
def file(tmp_path):
    def kind(name: str) -> Q:
        return Q.Q8_0 if "token_embd" in name else Q.Q4_0

    return files.model_file(tmp_path, "llama", kind)


def test_inspect_says_the_formats(file):
    done = CliRunner().invoke(app, ["inspect", str(file), "--json"])
    assert done.exit_code == 0, done.stderr
    notes = json.loads(done.stdout)["notes"]
    said = "20 tensors are stored as a GGUF file has them: 14 in q4_0, 5 in f32, 1 in q8_0"
    assert said in notes
    file.write_bytes(file.read_bytes()[:-999])
    done = CliRunner().invoke(app, ["inspect", str(file), "--json"])
    assert "ends before" in done.stdout + done.stderr


def test_bench_counts_the_bytes_that_are_read(file):
    model = open_model(str(file), "bf16", packed=True)
    assert isinstance(model.lm_head.weight, PackedTensor)
    assert model.dtype == torch.bfloat16
    table, vectors = 160 * 64 // 32 * 34, 5 * 64 * 2
    matrices = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3) // 32 * 18
    assert parameter_bytes(model) == token_bytes(model) == table + vectors + matrices
    (file.parent / "config.json").write_text("{}")
    with pytest.raises(FlashNormError, match="is no GGUF file"):
        open_model(str(file.parent), "bf16", packed=True)


def test_bench_leaves_it_packed(file):
    options = ["--rounds", "1", "--tokens", "2", "--context", "4", "--prefill", "2"]
    more = ["--packed", "--variants", "eager", "--dtype", "fp32", "--memory", "--json"]
    done = CliRunner().invoke(app, ["bench", str(file), *options, *more])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"]["packed"] is True
    assert not found["measured"][0]["failures"]
