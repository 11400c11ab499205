"""verify holds a fold of its own against what the fold makes: bounds let a wrong weight pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashnorm
from flashnorm.loading import load_model
from flashnorm.verification.folded import NOT_COMPARED, compared_weights, is_own_fold
from flashnorm.verification.report import Report

from . import tiny

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model in bfloat16 and its fold."""
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path / "a")
    flashnorm.fold_checkpoint(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def check(a: Path, b: Path, **options: Any) -> Report:
    return flashnorm.verify(a, b, **{"tokens": 128, "sample": 64, **options})


def change(path: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name] = how(tensors[name])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def one_bit(weight: torch.Tensor) -> torch.Tensor:
    weight.view(torch.int16)[3, 5] ^= 1
    return weight


def mark(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["flashnorm"] |= changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("stream", [False, True])
def test_a_single_bit_is_found_and_named(pair: tuple[Path, Path], stream: bool) -> None:
    report = check(*pair, stream=stream)
    assert report.ok, str(report)
    assert report.weights is not None
    assert (report.weights.compared, report.weights.wrong) == (29, ())
    change(pair[1], NAME, one_bit)
    told: list[tuple[int, int, str]] = []
    report = check(*pair, stream=stream, progress=lambda *step: told.append(step))
    assert report.checks[0].ok  # no bound on outputs finds it
    assert not report.ok
    assert report.checks[-1].name == "weights"
    assert f"1 of 29 are not what the fold makes: {NAME}: [3, 5] is" in report.checks[-1].detail
    assert report.to_json()["weights"]["wrong"] == [NAME]
    assert (told[-1][0], told[-1][1]) == (10, 11)
    assert NAME in str(report)


def test_however_many_are_wrong_they_are_named(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are listed."""
    monkeypatch.setattr("flashnorm.verification.weights.LISTED", 2)
    names = [f"model.layers.{i}.mlp.{name}_proj.weight" for i in (0, 1) for name in ("up", "gate")]
    for name in names:
        change(pair[1], name, one_bit)
    weights = compared_weights(*pair)
    assert weights is not None
    assert len(weights.wrong) == 2
    assert {*weights.wrong} < {*names}


def test_what_is_no_fold_of_this_version_is_judged_by_its_outputs(pair: tuple[Path, Path]) -> None:
    a, b = pair
    change(b, NAME, one_bit)
    for changes in ({"version": "0.0.1"}, {"folded": ["model.norm.weight"]}):
        before = (b / "config.json").read_text()
        mark(b, **changes)
        assert compared_weights(a, b) is None
        report = check(a, b)
        assert report.ok
        assert (NOT_COMPARED in report.notes) == ("folded" in changes)
        (b / "config.json").write_text(before)
    assert not is_own_fold(a)
    assert not is_own_fold("organization/model")
    assert not is_own_fold(torch.nn.Linear(2, 2))
    assert compared_weights(torch.nn.Linear(2, 2), b) is None
    live = check(load_model(a), b)
    assert (live.weights, NOT_COMPARED in live.notes) == (None, False)
    assert check(a, a).weights is None


def test_a_fold_that_was_converted_since_is_judged_by_its_outputs(pair: tuple[Path, Path]) -> None:
    a, b = pair
    change(b, NAME, lambda weight: weight.float())
    assert compared_weights(a, b) is None
    change(b, NAME, lambda weight: weight.bfloat16())
    assert compared_weights(a, b) is not None
    change(b, "model.norm.weight", lambda weight: weight[:-1].contiguous())
    assert compared_weights(a, b) is None


def test_the_last_bit_of_a_sum_is_the_machines(tmp_path: Path) -> None:
    """A bias that takes W β may be rounded otherwise elsewhere: that alone fails nobody."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = tiny._random(GPTNeoXForCausalLM, GPTNeoXConfig)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "a")
    flashnorm.fold_checkpoint(tmp_path / "a", tmp_path / "b")
    name = "gpt_neox.layers.0.attention.query_key_value.bias"
    assert not torch.equal(
        *(load_file(tmp_path / side / "model.safetensors")[name] for side in "ab")
    )

    def last_bit(bias: torch.Tensor) -> torch.Tensor:
        bias.view(torch.int16)[3] ^= 1
        return bias

    change(tmp_path / "b", name, last_bit)
    found = flashnorm.verify_weights(tmp_path / "a", tmp_path / "b")
    assert [(one.tensor, one.summed) for one in found.wrong] == [(name, True)]
    assert "a sum, whose last bit may depend on the machine" in str(found).replace("\n", " ")
    weights = compared_weights(tmp_path / "a", tmp_path / "b")
    assert weights is not None
    assert (weights.wrong, weights.compared) == ((), found.compared - 1)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    change(tmp_path / "b", name, one_bit)
    weights = compared_weights(tmp_path / "a", tmp_path / "b")
    assert weights is not None
    assert weights.wrong == (name,)
