"""SmolLM2-135M-Instruct, a real model, folded by hand: exact in float64, no worse in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from flashnorm import FlashNormError, verify
from flashnorm.demo import find_gguf, run_demo
from flashnorm.loading import dequantize_gguf, load_model, load_tokenizer
from flashnorm.verification.report import Report

from . import tiny


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


def test_sixty_norms_fold_exactly(model: Any, tokenizer: Any) -> None:
    folded = tiny.folded(model)
    gains = [norm.weight for norm, _ in tiny.readers(folded)]
    assert len(gains) == 60
    assert all(bool((gain == 1).all()) for gain in gains)
    assert_equal_models(verify(model, folded, tokenizer=tokenizer, tokens=512, sample=256))


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
def test_a_directory_against_a_directory(tmp_path: Path) -> None:
    original, folded = tmp_path / "original", tmp_path / "folded"
    dequantize_gguf(gguf(), original)
    model: Any = tiny.folded(load_model(original))
    model.save_pretrained(folded)
    del model
    report = verify(original, folded)
    assert_equal_models(report)
    assert report.perplexity is not None
    assert report.perplexity.tokens >= 4000


@pytest.mark.slow
def test_the_demo_runs_and_proves_the_fold(tmp_path: Path) -> None:
    gguf()
    assert run_demo(tmp_path).ok
    assert run_demo(tmp_path).ok  # the folded checkpoint of the first run is replaced
