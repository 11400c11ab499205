"""SmolLM2-135M-Instruct, a real model: exact in float64, no worse in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import flashnorm
from flashnorm import FlashNormError, verify
from flashnorm.demo import find_gguf, run_demo
from flashnorm.loading import dequantize_gguf, load_model, load_tokenizer
from flashnorm.verification.precision import float64_truth
from flashnorm.verification.report import Report


def gguf() -> Path:
    try:
        return find_gguf()
    except FlashNormError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(gguf())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(gguf())


def assert_equal_models(report: Report) -> None:
    print(report)
    assert report.ok, str(report)
    assert report.float64.max <= 1e-12
    assert report.float32.max <= 2e-5
    assert report.half_dtype == "bfloat16"
    assert report.half is not None
    assert report.half.ratio <= 1.1
    assert report.greedy is not None
    assert report.greedy.reference == report.greedy.candidate
    assert len(report.greedy.reference) == 64
    assert report.perplexity is not None
    change = abs(report.perplexity.candidate / report.perplexity.reference - 1)
    assert change < report.float32_bound


@pytest.fixture(scope="module")
def original(tmp_path_factory: Any) -> Path:
    return dequantize_gguf(gguf(), tmp_path_factory.mktemp("smollm2") / "original")


def test_sixty_of_sixty_one_norms_fold_exactly(original: Path, tmp_path: Path) -> None:
    folded = tmp_path / "folded"
    plan = flashnorm.fold_checkpoint(original, folded)
    assert len(plan.folded) == 60
    assert len(plan.sites) == 61
    assert "tied to" in plan.sites[-1].reason
    stock = AutoModelForCausalLM.from_pretrained(folded)
    parameters = dict(stock.named_parameters())
    assert all(bool((parameters[gain.parameter] == 1).all()) for gain in plan.gains())
    assert_equal_models(verify(original, stock, tokens=512, sample=256))


def test_memory_and_disk_give_the_same_bits(model: Any, original: Path, tmp_path: Path) -> None:
    """With an untied head all 61 norms fold."""
    folded = tmp_path / "folded"
    plan = flashnorm.fold_checkpoint(original, folded, untie=True)
    assert len(plan.folded) == 61
    in_memory = copy.deepcopy(model)
    flashnorm.fold_(in_memory, untie=True)
    stock = AutoModelForCausalLM.from_pretrained(folded)
    expected = in_memory.state_dict()
    assert stock.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in stock.state_dict().items())


def test_all_sixty_one_norms_fold_exactly_with_a_head_of_its_own(model: Any) -> None:
    """In float64, because products with the embedding need more digits than float32 has."""
    exact = copy.deepcopy(model).double()
    ids = torch.arange(2000, 2064).view(2, 32)
    with float64_truth():
        before = exact(ids).logits
        assert len(flashnorm.folding(flashnorm.fold_(exact, untie=True)).folded) == 61
        after = exact(ids).logits
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-12


def test_one_gain_element_off_by_a_thousandth_is_found(model: Any, tokenizer: Any) -> None:
    """Element 5 of layer 0 moves the logits least of those tried: by 5e-6 of the largest."""
    candidate = copy.deepcopy(model)
    with torch.no_grad():
        candidate.model.layers[0].input_layernorm.weight[5] *= 1 + 1e-3
    report = verify(model, candidate, tokenizer=tokenizer, tokens=64, sample=64)
    assert not report.ok
    assert report.first_wrong_layer is not None
    assert report.first_wrong_layer.path == "model.layers.0.self_attn.q_proj"


@pytest.mark.slow
def test_the_demo_runs_and_proves_the_fold(tmp_path: Path) -> None:
    gguf()
    assert run_demo(tmp_path).ok
    assert run_demo(tmp_path).ok  # the folded checkpoint of the first run is replaced
