"""Every decoder decodes the same logits where its growing cache is appended to in place."""

import copy

import pytest
import torch

import flashnorm
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.runtime import growing
from flashnorm.verification.bounds import owns_matrix, width_of
from tests.errors import relative, rounding

from . import causal_lm_types, tiny_inputs, tiny_model

# One of each way to cache: heads in groups or not, latent keys.
QUICK = {"llama", "gpt2", "gpt_neox", "opt", "deepseek_v3", "mixtral"}
STEPS = 3
pytestmark = pytest.mark.skipif(not cpu.available()[0], reason="no compiled kernels here")


def names():
    found = causal_lm_types()
    assert set(found) >= QUICK
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in found]


@torch.no_grad()
def decoded(model, inputs):
    """The logits of some tokens that are decoded one by one after the inputs, and the cache."""
    found = model(**copy.deepcopy(inputs), use_cache=True)
    logits = []
    for token in range(3, 3 + STEPS):
        ids = torch.full((len(found.logits), 1), token)
        logits.append(model(input_ids=ids, past_key_values=found.past_key_values).logits)
    return torch.cat(logits, 1), found.past_key_values


@pytest.mark.parametrize("name", names())
def test_decoded_logits_are_those_of_a_concatenated_cache(name):
    model = tiny_model(name)
    inputs = {"input_ids": tiny_inputs(model, model.config)["input_ids"]}
    try:
        model.set_attn_implementation("sdpa")
        expected, _ = decoded(copy.deepcopy(model), inputs)
    except (ValueError, TypeError, AttributeError) as error:
        assert name not in QUICK
        pytest.skip(f"the model as it is does not do it: {error}")  # nothing to hold ours against
    flashnorm.accelerate_(model, copy.deepcopy(inputs))
    found, cache = decoded(model, inputs)
    depth = sum(map(owns_matrix, model.modules()))
    assert relative(found, expected) < rounding(width_of(model), depth, torch.float32)
    if name in QUICK:
        assert all(type(vars(layer)[growing.ROOM]) is growing.Room for layer in cache.layers)
