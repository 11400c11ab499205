"""The example trains: a few steps of each way, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from flashnorm.verification.bounds import Size, output_bound

DTYPE = torch.float32
FILE = Path(__file__).parents[2] / "examples" / "train_tiny_llama.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_tiny_llama", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_and_writes(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--steps", "6", "--out", str(tmp_path / "a" / "b")])
    example.main()
    found = json.loads((tmp_path / "a" / "b.json").read_text())
    assert list(found) == ["plain", "fused", "weightless"]
    for run in found.values():
        assert len(run["losses"]) == 6
        assert run["losses"][-1] < run["losses"][0] - 1
    # Each step of Adam moves by the signs of small gradients: only the first ones are comparable.
    bound = output_bound(Size(example.FFN, 6 * example.LAYERS, DTYPE), DTYPE)
    pairs = list(zip(found["plain"]["losses"], found["fused"]["losses"], strict=True))
    assert all(abs(a - b) <= bound * a for a, b in pairs[:2])
    assert found["fused"]["saved_bytes"] < 0.6 * found["plain"]["saved_bytes"]
    assert "weightless: step 6 of 6" in capsys.readouterr().out


def test_the_weightless_model_has_matrices_only(example):
    assert {p.ndim for p in example.Weightless().parameters()} == {2}


def test_a_way_that_does_not_exist_is_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--ways", "plain,magic"])
    with pytest.raises(SystemExit):
        example.main()
    assert "no way to train is called magic" in capsys.readouterr().err


def test_the_weightless_model_is_a_llama_whose_gains_are_one(example):
    whole, ours = example.plain().double(), example.weightless().double()
    ids = example.batches(example.text(), 1)[0, :2, :20]
    with torch.no_grad():
        found, expected = ours(ids), whole(ids).logits
    # The model of transformers computes norms and rotations in float32 whatever its dtype is.
    bound = output_bound(Size(example.FFN, 6 * example.LAYERS, DTYPE), DTYPE)
    assert (found - expected).abs().max() <= bound * expected.abs().max()
