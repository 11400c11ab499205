"""The page of recipes is a promise: its blocks are run as they stand, on four architectures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PhiConfig,
    Starcoder2Config,
)

pytest.importorskip("torchao", reason="the last recipe quantizes with it")

import flashnorm
from flashnorm.verification import float64_truth
from tests.errors import rounding
from tests.zoo import randomize_

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
FOUND = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BLOCKS = [text for text in FOUND if "llmcompressor" not in text]  # test_llmcompressor.py
WIDTH = 48
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {"vocab_size": 96, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}
TAKEN = {
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "phi": PhiConfig(**SHAPE),
    "starcoder2": Starcoder2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
}
REFUSED = {
    "olmo2": Olmo2Config(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=12),
    "bloom": BloomConfig(**BLOOM),
}
OUTLIERS = (5, 17)  # features whose gains are large, as they are in trained models


def a_model(config: Any) -> Any:
    """Random gains and biases, and features that stand out at every norm."""
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize_(model, 0)
    with torch.no_grad():
        for gain in flashnorm.inspect(model).gains():
            model.get_parameter(gain.parameter)[list(OUTLIERS)] += 3
    return model


@pytest.fixture(scope="module", params=TAKEN)
def names(request, tmp_path_factory):
    """What the page leaves behind, after all of its blocks."""
    folder = tmp_path_factory.mktemp(request.param)
    a_model(TAKEN[request.param]).save_pretrained(folder / "my-model")
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for text in BLOCKS:
            exec(compile(text, "recipes.md", "exec"), found)
    return {**found, "folder": folder}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def scale(names: dict[str, Any]) -> float:
    return float(names["truth"].abs().max())


def test_all_norms_are_folded_and_every_layer_writes_the_stream(names):
    plan = names["plan"]
    assert len(plan.folded) == len(plan.sites) >= 3
    assert len(names["writers"]) >= 1 + 2 * SHAPE["num_hidden_layers"]


def test_a_rotation_keeps_the_ones_and_turns_the_rest():
    found: dict[str, Any] = {"torch": torch, "nn": torch.nn}
    exec(next(text for text in BLOCKS if "def rotation" in text), found)
    q = found["rotation"](WIDTH, 1)
    ones = torch.ones(WIDTH, dtype=torch.float64)
    assert torch.allclose(q @ q.T, torch.eye(WIDTH, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(q @ ones, ones, atol=1e-13)
    assert q.abs().max() < 0.9


@pytest.mark.parametrize("kind", ["rotated", "smoothed"])
def test_a_saved_checkpoint_computes_what_the_original_computes(names, kind):
    place = names["folder"] / kind
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).eval()
    with float64_truth():
        error = (logits(model, names["ids"]) - names["expected"]).abs().max()
    assert error < rounding(SHAPE["intermediate_size"], 20) * scale(names)


def test_the_fold_is_only_rounded(names):
    error = (names["truth"] - names["expected"]).abs().max()
    assert 0 < error < rounding(SHAPE["intermediate_size"], 20, torch.float32) * scale(names)


def test_what_writes_or_reads_the_stream_is_turned_and_nothing_else(names):
    sites = names["plan"].sites
    turned = {name for name, _ in names["writers"]} | {site.norm_bias for site in sites}
    turned |= {consumer.parameter for site in sites for consumer in site.consumers}
    rotated = dict(names["rotated"].named_parameters())
    for name, before in names["folded"].named_parameters():
        changes = name in turned and bool(before.any())  # biases that were folded are zero
        assert torch.equal(before, rotated[name]) != changes, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothing_by_powers_of_two_changes_no_bit(names, dtype):
    folded, smoothed = (
        AutoModelForCausalLM.from_pretrained(names["folder"] / kind, dtype=dtype).eval()
        for kind in ("folded", "smoothed")
    )
    pairs = zip(folded.parameters(), smoothed.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    assert torch.equal(logits(smoothed, names["ids"]), logits(folded, names["ids"]))


def test_smoothing_meets_in_the_middle(names):
    """With α = 1/2 the largest activation of a feature and the largest weight on it are alike."""
    outputs = names["outputs_of"](names["smoothed"], names["plan"], names["ids"])
    parameters = dict(names["smoothed"].named_parameters())
    for site in names["plan"].folded:
        weights = torch.cat(
            [
                parameters[c.parameter].detach().movedim(c.axis, -1).flatten(0, -2)
                for c in site.consumers
            ]
        )
        ratio = outputs[site.path].abs().amax(0) / weights.abs().amax(0)
        assert (ratio.log2().abs() <= 1 + 1e-9).all(), site.path  # s is rounded by half a power


def test_four_bits_cost_something_and_say_how_much(names):
    assert set(names["divergence"]) == {"original", "folded", "rotated"}
    assert all(0 < value < 10 for value in names["divergence"].values())


@pytest.mark.parametrize("family", REFUSED)
def test_what_a_rotation_cannot_pass_is_refused_by_name(family):
    found: dict[str, Any] = {"flashnorm": flashnorm, "torch": torch, "nn": torch.nn}
    exec("import copy", found)
    exec(next(text for text in BLOCKS if "def stream_of" in text), found)
    model = a_model(REFUSED[family])
    plan = flashnorm.inspect(model, untie=True)
    with pytest.raises(ValueError, match=r"is not folded as a whole: .+"):
        found["stream_of"](model, plan)
