"""Continuous batching of transformers on accelerated models: the tokens of models that are not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

import flashnorm
from flashnorm.compat.transformers_names import attention_of
from tests.engines.models import FAMILIES, write

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [3], list(range(20, 60))]
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=-1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {family: write(family, tmp_path_factory.mktemp("batch") / family) for family in FAMILIES}


def batched(model, prompts=PROMPTS, **options):
    # Otherwise the cache takes most of the machine's memory.
    small = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    found = model.generate_batch(
        prompts, generation_config=GREEDY, continuous_batching_config=small, **options
    )
    return [answer.generated_tokens for answer in found.values()]


# Of the first, every attention that takes batches of it; of the others their own.
CASES = [(family, None) for family in FAMILIES] + [("llama", "eager"), ("llama", "paged|eager")]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_batch_says_what_it_said(checkpoints, family, attention):
    path, chosen = checkpoints[family], {"attn_implementation": attention}
    expected = batched(AutoModelForCausalLM.from_pretrained(path, **chosen))
    assert [len(tokens) for tokens in expected] == [12] * len(PROMPTS)
    model = flashnorm.accelerate_(AutoModelForCausalLM.from_pretrained(path, **chosen))
    before = attention_of(model.config)
    assert flashnorm.acceleration(model).fused
    assert batched(model) == expected
    assert attention_of(model.config) == before
    assert batched(model) == expected


def test_a_manager_that_is_kept_and_generate_in_between(checkpoints):
    original = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    expected = batched(original)
    model = flashnorm.accelerate_(AutoModelForCausalLM.from_pretrained(checkpoints["llama"]))
    before = attention_of(model.config)
    prompt = torch.tensor([PROMPTS[1]])
    for _ in range(2):
        assert batched(model, persistent_manager=True) == expected
        assert attention_of(model.config) == before
        said = model.generate(prompt, generation_config=GREEDY)[0, len(PROMPTS[1]) :]
        assert said.tolist() == expected[1]
    model.destroy_cached_continuous_batching_manager()
    flashnorm.restore_(model)
    assert batched(model) == expected
