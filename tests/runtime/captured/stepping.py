"""Models whose steps the twin of CUDA graphs captures, and steps of them."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from transformers import Gemma2Config, MistralConfig, StaticCache

import flashnorm
from flashnorm.kernels import dispatch
from tests.runtime.models import LLAMA, SIZES, close, ids, tiny
from tests.toys.twin import TwinBackend, unwatched

MISTRAL = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
GEMMA2 = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=8)
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
FIXED = {**GREEDY, "cache_implementation": "static"}


def captured(config=LLAMA, **options):
    """(a model as it is, one like it whose steps are captured)."""
    original = tiny(config)
    return original, flashnorm.capture_(flashnorm.accelerate_(copy.deepcopy(original)), **options)


def static(model, length=16):
    return StaticCache(config=model.config, max_cache_len=length)


def begun(model, tokens=None, length=16):
    """A static cache after a prompt."""
    cache = static(model, length)
    with torch.no_grad():
        model(ids() if tokens is None else tokens, past_key_values=cache)
    return cache


def step(model, cache, token=7, batch=1, **options):
    with torch.no_grad():
        given = torch.full((batch, 1), token)
        return model(given, past_key_values=cache, use_cache=True, **options).logits


def reasons(act):
    """(what `act` returns, why steps in it were not captured)."""
    before = dispatch.fallbacks()
    found = act()
    after = dispatch.fallbacks()
    said = [k for k, n in after.items() if n != before.get(k) and k.startswith("decode step")]
    return found, said


def same_caches(a, b):
    return all(
        close(x.keys, y.keys)
        and close(x.values, y.values)
        and torch.equal(x.cumulative_length, y.cumulative_length)
        for x, y in zip(a.layers, b.layers, strict=True)
    )


@contextmanager
def twins(monkeypatch):
    """The context in which models are accelerated on the twin."""
    found = TwinBackend()
    dispatch.register(found)
    unwatched(monkeypatch, found.captures)
    try:
        yield found
    finally:
        dispatch.unregister(found)


def run_steps(original, model, change, again=3):
    """Steps before and after a change; why those after it were not captured."""
    cache, own = begun(model), begun(original)
    for token in range(3):
        assert close(step(model, cache, token), step(original, own, token))
    change(original), change(model)
    said = []
    for token in range(again):
        found, more = reasons(lambda token=token: step(model, cache, token))
        said.append(more)
        assert close(found, step(original, own, token))
        assert same_caches(cache, own)
    return said


class Wrapped(torch.nn.Module):
    """A module inside of another one, which does what a test wants with what it is given."""

    def __init__(self, inner, act):
        super().__init__()
        self.inner, self.act = inner, act

    def forward(self, hidden_states, **kwargs):
        return self.act(self.inner, hidden_states, kwargs)


def wrapped(owner, name, act):
    """A tiny model, and in its second layer a module wrapped: `owner` names what holds it."""
    original = tiny()
    holder = original.model.layers[1].get_submodule(owner)
    setattr(holder, name, Wrapped(getattr(holder, name), act).eval())
    return original
