"""Weights that accelerate keeps elsewhere: before folding and accelerating, and after."""

import copy
import itertools
import warnings

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module

import flashnorm
from flashnorm.graph.offload import is_replaced
from tests.errors import relative

from .test_field_states import EXACT, IDS, gpt2, llama

PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
OFFLOADS = {
    "cpu": lambda model, path: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, path: accelerate.disk_offload(model, path, torch.device("cpu")),
    "both": lambda model, path: accelerate.dispatch_model(
        model, PLACES, main_device="cpu", offload_dir=path, force_hooks=True
    ),
}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    count = itertools.count()

    def put(model):
        folder = tmp_path / f"offloaded-{next(count)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            OFFLOADS[request.param](model, str(folder))
        assert any(parameter.is_meta for parameter in model.parameters())

    return put


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def take_off(model):
    remove_hook_from_module(model, recurse=True)


def test_field_an_offloaded_model_is_inspected_as_the_plain_one(offload):
    model = llama()
    expected = flashnorm.inspect(model)
    offload(model)
    assert flashnorm.inspect(model).sites == expected.sites


def test_field_offloaded_weights_are_not_folded_and_nothing_is_touched(offload):
    model = llama()
    expected = logits(model)
    offload(model)
    words = r"the weights of .* are offloaded by accelerate.*remove_hook_from_module.*fold, and"
    with pytest.raises(flashnorm.FoldError, match=words):
        flashnorm.fold_(model)
    assert torch.equal(logits(model), expected)
    assert not hasattr(model.config, "flashnorm")
    take_off(model)
    assert flashnorm.folding(flashnorm.fold_(model)).folded
    assert relative(logits(model), expected) < 1e-6  # its rotation is in float32
    offload(model)
    assert relative(logits(model), expected) < 1e-6


def test_field_a_folded_model_that_is_offloaded_unfolds_when_it_is_back(offload):
    model = llama()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    flashnorm.fold_(model)
    folded = logits(model)
    offload(model)
    assert torch.equal(logits(model), folded)
    with pytest.raises(flashnorm.FoldError, match=r"offloaded by accelerate.*unfold, and offload"):
        flashnorm.unfold_(model)
    assert torch.equal(logits(model), folded)
    take_off(model)
    flashnorm.unfold_(model)
    assert all(relative(v, original[k]) < EXACT for k, v in model.state_dict().items())


def test_field_a_centered_model_that_is_offloaded_unfolds_when_it_is_back(tmp_path):
    model = gpt2()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    flashnorm.fold_(model, center=True)
    folded = logits(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(logits(model), folded)
    take_off(model)
    flashnorm.unfold_(model)
    assert all(relative(v, original[k]) < EXACT for k, v in model.state_dict().items())


def test_field_an_offloaded_model_accelerates_and_is_restored(offload):
    model = llama(dtype=torch.float32)
    expected = logits(model)
    offload(model)
    flashnorm.accelerate_(model)
    assert torch.equal(logits(model), expected)
    with flashnorm.original(model):
        assert torch.equal(logits(model), expected)
    flashnorm.restore_(model)
    assert torch.equal(logits(model), expected)
    take_off(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("first", ["hooks", "kernels"])
def test_field_an_accelerated_model_that_is_offloaded_is_restored(offload, first):
    plain = llama(dtype=torch.float32)
    model = flashnorm.accelerate_(copy.deepcopy(plain))
    expected = logits(plain)
    bound = 2**-23 * 48 * 40  # of sums of up to 48 products, in some 40 operations in a row
    offload(model)
    for _ in range(3):
        assert relative(logits(model), expected) < bound
    steps = [lambda: take_off(model), lambda: flashnorm.restore_(model)]
    for step in steps if first == "hooks" else reversed(steps):
        step()
        assert relative(logits(model), expected) < bound
    assert torch.equal(logits(model), expected)
    if first == "hooks":
        assert not any(is_replaced(module) for module in model.modules())
