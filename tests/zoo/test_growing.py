"""Every decoder decodes the same logits where its growing cache is appended to in place."""

import copy

import pytest
import torch

import flashnorm
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.runtime import growing
from tests.errors import relative

from . import causal_lm_types, tiny_inputs, tiny_model

# One of each way to cache: heads in groups or not, latent keys, rotated parts, an encoder's.
QUICK = {"llama", "gpt2", "gpt_neox", "falcon", "opt", "deepseek_v3", "mixtral", "bart", "moshi"}
STEPS = 3
pytestmark = pytest.mark.skipif(not cpu.available()[0], reason="no compiled kernels here")


def names():
    found = causal_lm_types()
    assert set(found) >= QUICK
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in found]


@torch.no_grad()
def decoded(model, inputs):
    """The logits of some tokens that are decoded one by one after the inputs."""
    found = model(**copy.deepcopy(inputs), use_cache=True)
    logits = []
    for token in range(3, 3 + STEPS):
        ids = torch.full((len(found.logits), 1), token)
        logits.append(model(input_ids=ids, past_key_values=found.past_key_values).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", names())
def test_decoded_logits_are_those_of_a_concatenated_cache(name):
    model = tiny_model(name)
    inputs = {"input_ids": tiny_inputs(model, model.config)["input_ids"]}
    try:
        model.set_attn_implementation("sdpa")
        expected = decoded(copy.deepcopy(model), inputs)
    except (ValueError, TypeError, AttributeError) as error:
        pytest.skip(f"it does not decode by itself, or has no sdpa: {error}")
    flashnorm.accelerate_(model, copy.deepcopy(inputs))
    if not isinstance(vars(model).get("forward"), growing.Growing):
        pytest.skip("its attention is its own, and so is its cache")
    assert relative(decoded(model, inputs), expected) < 1e-4
