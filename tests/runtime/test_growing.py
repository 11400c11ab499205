"""A growing cache is appended to in place: its values are those of its own concatenation."""

from __future__ import annotations

import copy
import io
import pickle
from functools import wraps

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import flashnorm
from flashnorm.runtime import growing
from tests.runtime.models import LLAMA, close, ids, tiny

STEPS = 7

pytestmark = pytest.mark.usefixtures("only_compiled")


@pytest.fixture
def model():
    return flashnorm.accelerate_(tiny())


@pytest.fixture
def appended(monkeypatch):
    """Grows by one for every layer that was appended to in place."""
    found, append = [], growing.Room.append

    def noted(room, new):
        found.append(room)
        return append(room, new)

    monkeypatch.setattr(growing.Room, "append", noted)
    return found


@pytest.fixture(autouse=True)
def small_rooms(monkeypatch):
    """So that a few tokens fill several."""
    monkeypatch.setattr(growing, "LEAST", 3)


def prefill(model, tokens=None, cache=None):
    with torch.no_grad():
        return model(ids() if tokens is None else tokens, past_key_values=cache).past_key_values


def step(model, cache, token=7, count=1):
    with torch.no_grad():
        return model(torch.full((1, count), token), past_key_values=cache).logits


def copied(model, cache, token=7):
    """The logits of a step whose cache is concatenated, and that cache."""
    own = DynamicCache(config=LLAMA)
    for i, layer in enumerate(cache.layers):
        if layer.get_seq_length():
            own.update(layer.keys.clone(), layer.values.clone(), i)
    forward = vars(model).pop("forward")
    try:
        return step(model, own, token), own
    finally:
        vars(model)["forward"] = forward


def same(a, b):
    return all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)
        for x, y in zip(a.layers, b.layers, strict=True)
    )


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_every_step_is_that_of_a_concatenated_cache(model, appended, context):
    with context():
        cache = prefill(model)
        for token in range(1, 3 * STEPS):
            expected, own = copied(model, cache, token)
            assert torch.equal(step(model, cache, token), expected)
            assert same(cache, own)
    assert len(appended) == 2 * (3 * STEPS - 1)
    assert 2 * 4 < len({id(room) for room in appended}) < len(appended)


def test_several_tokens_at_once(model, appended):
    cache = prefill(model)
    own = prefill(model)
    expected = torch.cat([step(model, own, token) for token in (3, 3, 3, 3, 3)], 1)
    assert close(step(model, cache, 3, count=5), expected)
    for a, b in zip(cache.layers, own.layers, strict=True):
        assert close(a.keys, b.keys)
        assert close(a.values, b.values)
    assert len(appended) == 2 * 6


def test_what_somebody_kept_does_not_change(model):
    cache = prefill(model)
    step(model, cache)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    before = copy.deepcopy(kept)
    for token in range(STEPS):
        step(model, cache, token)
    for (keys, values), (k, v) in zip(kept, before, strict=True):
        assert torch.equal(keys, k)
        assert torch.equal(values, v)


def fork_by_layers(cache):
    """Another cache whose layers begin with the same tensors, as who shares a prefix has it."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.parametrize("fork", [fork_by_layers, copy.deepcopy], ids=["layers", "deepcopy"])
def test_two_ways_to_go_on_from_one_prefix(model, fork):
    cache = prefill(model)
    step(model, cache)
    other = fork(cache)
    for token in range(STEPS):
        for way, seed in ((cache, token), (other, 50 + token)):
            expected, own = copied(model, way, seed)
            assert torch.equal(step(model, way, seed), expected)
            assert same(way, own)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.reset(),
        lambda cache: cache.layers[1].values.mul_(2),
        lambda cache: vars(cache.layers[0]).update(keys=cache.layers[0].keys.clone() * 3),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: setattr(cache.layers[0].keys, "data", cache.layers[0].keys.clone() * 3),
    ],
    ids=["crop", "reorder", "reset", "in place", "replaced", "repeat", "data"],
)
def test_a_cache_that_was_changed_in_between(model, change):
    cache = prefill(model)
    step(model, cache)
    change(cache)
    for token in range(STEPS):
        expected, own = copied(model, cache, token)
        assert torch.equal(step(model, cache, token), expected)
        assert same(cache, own)


def test_modes_take_turns(model):
    """What inference mode made is not written outside of it, and the other way round."""
    with torch.inference_mode():
        cache = prefill(model)
        step(model, cache)
    for token in range(STEPS):
        expected, own = copied(model, cache, token)
        if token % 2:
            with torch.inference_mode():
                found = step(model, cache, token)
        else:
            found = step(model, cache, token)
        assert torch.equal(found, expected)
        assert same(cache, own)


def test_generate_gives_the_same_tokens_and_leaves_a_plain_cache(model, appended):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "return_dict_in_generate": True}
    found = model.generate(ids(), do_sample=False, **options)
    expected = tiny().generate(ids(), do_sample=False, **options)
    assert torch.equal(found.sequences, expected.sequences)
    cache = found.past_key_values
    assert len(appended) == 2 * 11
    assert "update" not in vars(cache)
    assert type(cache) is DynamicCache
    held = io.BytesIO()
    torch.save([layer.keys for layer in cache.layers], held)
    again = pickle.loads(pickle.dumps(cache))
    assert same(again, cache)
    assert vars(again.layers[0])[growing.ROOM] is None


def test_an_error_leaves_the_cache_as_it_is(model, monkeypatch):
    cache = prefill(model)
    length = cache.get_seq_length()
    monkeypatch.setattr(model, "lm_head", torch.nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        step(model, cache)
    assert "update" not in vars(cache)
    assert cache.get_seq_length() == length + 1  # as by its own code: the layers had been run


def test_with_a_gradient_it_is_concatenated(model, appended):
    cache = prefill(model)
    model(ids(length=1), past_key_values=cache).logits.sum().backward()
    assert not appended
    assert cache.layers[0].keys.requires_grad


class Doubling(DynamicCache):
    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(2 * key_states, value_states, layer_idx)


class Counting(DynamicLayer):
    seen = 0

    def update(self, key_states, value_states, *args, **kwargs):
        Counting.seen += 1
        return super().update(key_states, value_states)


def of_counting_layers(cache):
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in cache.layers:
        layer.__class__ = Counting
    return cache


def patched_layer(cache):
    for layer in cache.layers:
        layer.update = DynamicLayer.update.__get__(layer)
    return cache


def patched_cache(cache):
    cache.update = DynamicCache.update.__get__(cache)
    return cache


def of_another_class(cache):
    cache.__class__ = Doubling
    return cache


@pytest.mark.parametrize(
    "change", [of_counting_layers, patched_layer, patched_cache, of_another_class]
)
def test_what_has_other_code_runs_it(model, appended, change):
    cache, own = change(prefill(model)), change(prefill(tiny()))
    for token in range(STEPS):
        assert close(step(model, cache, token), step(tiny(), own, token))
    assert not appended


def test_code_that_somebody_replaced_is_not_stood_for(model, appended, monkeypatch):
    update = DynamicLayer.update

    @wraps(update)
    def counted(*args, **kwargs):
        seen.append(args)
        return update(*args, **kwargs)

    seen = []
    monkeypatch.setattr(DynamicLayer, "update", counted)
    step(model, prefill(model))
    assert not appended
    assert len(seen) == 2 * 2


def test_a_traced_model_concatenates(model, appended):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, token, keys, values):
            cache = DynamicCache(config=LLAMA)
            for i in range(2):
                cache.update(keys[i], values[i], i)
            return self.model(token, past_key_values=cache).logits

    cache = prefill(model)
    held = torch.stack([layer.keys for layer in cache.layers])
    with torch.no_grad():
        traced = torch.jit.trace(Step(), (ids(length=1), held, held), check_trace=False)
        other = torch.randn_like(held)
        expected = Step()(ids(length=1), other, other)
        appended.clear()
        assert close(traced(ids(length=1), other, other), expected)
    assert not appended


def test_restored_models_have_their_own_forward(model):
    assert type(vars(model)["forward"]) is growing.Growing
    flashnorm.restore_(model)
    assert "forward" not in vars(model)


def test_a_forward_that_somebody_put_there_stays():
    model = tiny()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    kept = model.forward
    flashnorm.accelerate_(model)
    assert model.forward is kept
