"""`capture_`: tokens and caches of captured steps are the model's own.

On a twin of CUDA graphs: see tests/toys/twin.py.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import DynamicCache, StaticCache

import flashnorm
from flashnorm.kernels import dispatch
from tests.runtime.captured.stepping import (
    FIXED,
    GEMMA2,
    GREEDY,
    MISTRAL,
    Wrapped,
    begun,
    captured,
    reasons,
    run_steps,
    same_caches,
    step,
    wrapped,
)
from tests.runtime.models import LLAMA, NEOX, QWEN3, close, ids

CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gpt_neox": NEOX}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_same(twin, name):
    original, model = captured(CONFIGS[name])
    with dispatch.forbid_fallback():
        found = model.generate(ids(), **FIXED)
    assert torch.equal(found, original.generate(ids(), **GREEDY))
    assert twin.replays == GREEDY["max_new_tokens"] - 2  # but for the prefill and the first step
    # The last norm's readers and the heads are read by nobody who is too late but once.
    assert twin.captures <= 2


def test_a_padded_batch(twin):
    original, model = captured()
    tokens, mask = ids(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with dispatch.forbid_fallback():
        found = model.generate(tokens, attention_mask=mask, **FIXED)
    assert torch.equal(found, original.generate(tokens, attention_mask=mask, **FIXED))
    assert twin.replays


@pytest.mark.parametrize("config", [MISTRAL, GEMMA2], ids=["mistral", "gemma2"])
def test_windows_are_captured_before_and_after_they_are_full(twin, config):
    """The prompt has 5 tokens, the window 8; what the host counts is given as positions."""
    original, model = captured(config)
    more = {"return_dict_in_generate": True, "output_logits": True}
    with dispatch.forbid_fallback():
        found = model.generate(ids(), **FIXED, **more)
    expected = original.generate(ids(), **GREEDY, **more)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(close(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    assert twin.replays == GREEDY["max_new_tokens"] - 3


def test_positions_are_given_where_only_the_host_has_counted_them(twin):
    """A loop of forwards that gives masks and no positions, past the end of the window."""
    original, model = captured(MISTRAL)
    cache, own = begun(model), begun(original)
    with dispatch.forbid_fallback():
        for token in range(9):
            seen = torch.arange(8).view(1, 1, 1, 8) < 6 + token
            found = step(model, cache, token, attention_mask=seen)
            assert close(found, step(original, own, token, attention_mask=seen)), token
    assert twin.replays == 7
    assert same_caches(cache, own)


def test_a_window_whose_count_is_asked_for_is_not_captured(twin):
    """Without a mask the model makes one from the count; caches are as they were."""
    original, model = captured(MISTRAL)
    cache, own = begun(model), begun(original)
    for token in range(6):
        found, said = reasons(lambda token=token: step(model, cache, token))
        assert close(found, step(original, own, token))
        assert same_caches(cache, own)
        first = token in (0, 3)  # of a window that is not full, and of one that is
        assert not said if first else "the host counts" in said[0]
    assert cache.layers[0].cumulative_length_int == own.layers[0].cumulative_length_int == 11
    assert twin.captures == 2  # once before the window is full, and once after
    assert not twin.replays


# Caches and batches.


def test_two_caches_in_turns(twin):
    original, model = captured()
    caches = [begun(model, ids(1, n, seed=n)) for n in (3, 6)]
    owns = [begun(original, ids(1, n, seed=n)) for n in (3, 6)]
    with dispatch.forbid_fallback():
        for token in range(10):
            cache, own = caches[token % 2], owns[token % 2]
            assert close(step(model, cache, token), step(original, own, token))
            assert same_caches(cache, own)
    assert twin.captures == 2
    assert twin.replays == 8


def test_a_full_cache_runs_the_models_own_code(twin):
    original, model = captured()
    cache, own = begun(model, length=8), begun(original, length=8)
    for _ in range(3):
        assert close(step(model, cache), step(original, own))
    before = twin.replays
    for each, held in ((original, own), (model, cache)):
        with pytest.raises(IndexError):
            step(each, held)
    assert dispatch.fallbacks()["decode step not captured: the cache is full"]
    assert twin.replays == before == 2


def test_a_cache_that_was_begun_again(twin):
    """Its count is written by others: the device is asked, and the graph is used again."""
    original, model = captured()
    cache, own = begun(model, length=8), begun(original, length=8)
    for _ in range(3):
        step(model, cache), step(original, own)
    for each, held in ((original, own), (model, cache)):
        held.reset()
        with torch.no_grad():
            each(ids(1, 4, seed=3), past_key_values=held)
    with dispatch.forbid_fallback():
        for token in range(3):
            assert close(step(model, cache, token), step(original, own, token))
    assert same_caches(cache, own)
    assert twin.captures == 1


def test_a_count_that_is_asked_for_after_a_layer_has_counted_is_not_captured(twin):
    held = []
    act = lambda inner, x, _: inner(x) * vars(held[-1].layers[0])["cumulative_length_int"]  # noqa: E731
    original, model = captured(MISTRAL)
    for each in (original, model):
        layer = each.model.layers[1].self_attn
        layer.o_proj = Wrapped(layer.o_proj, act).eval()
    caches = [StaticCache(config=MISTRAL, max_cache_len=16) for _ in "ab"]
    for each, cache in zip((original, model), caches, strict=True):
        held.append(cache)
        with torch.no_grad():
            each(ids(), past_key_values=cache)
    mask = {"attention_mask": torch.ones(1, 1, 1, 8, dtype=torch.bool)}
    for token in range(3):
        held.append(caches[0])
        expected = step(original, caches[0], token, **mask)
        held.append(caches[1])
        found, said = reasons(lambda token=token: step(model, caches[1], token, **mask))
        assert close(found, expected)
        assert not said if token == 0 else said
    assert not twin.replays


def test_another_batch_has_another_graph(twin):
    original, model = captured()
    for batch in (1, 2, 1):
        tokens = ids(batch, 5)
        cache, own = begun(model, tokens), begun(original, tokens)
        for token in range(4):
            found, said = reasons(lambda: step(model, cache, token, batch))  # noqa: B023
            assert close(found, step(original, own, token, batch))
            assert not said
    assert twin.captures == 3


def test_growing_caches_and_masks_run_the_models_own_code(twin):
    original, model = captured()
    caches = DynamicCache(), begun(model)
    owns = DynamicCache(), begun(original)
    with torch.no_grad():
        model(ids(), past_key_values=caches[0]), original(ids(), past_key_values=owns[0])
    mask = torch.ones(1, 6, dtype=torch.long)
    for cache, own, options in zip(caches, owns, ({}, {"attention_mask": mask}), strict=True):
        found, said = reasons(lambda: step(model, cache, **options))  # noqa: B023
        assert close(found, step(original, own, **options))
        assert len(said) == 1
    assert not twin.captures


def test_graphs_go_with_their_cache_and_the_oldest_first():
    _, model = captured(graphs=2)
    forward = vars(model)["forward"]
    caches = [begun(model) for _ in range(3)]
    for cache in caches:
        step(model, cache), step(model, cache)
    assert [key[0] for key in forward.graphs] == [id(cache) for cache in caches[1:]]
    assert all(forward.graphs.values())
    cache = None
    caches.pop()
    gc.collect()
    assert [key[0] for key in forward.graphs] == [id(caches[1])]


def test_logits_are_copies():
    _, model = captured()
    cache = begun(model)
    found = [step(model, cache, token) for token in range(5)]
    assert len({t.data_ptr() for t in found}) == 5
    assert len({tuple(t.flatten().tolist()) for t in found}) == 5


def test_a_view_of_the_cache_knows_that_it_was_written():
    _, model = captured()
    cache = begun(model)
    step(model, cache), step(model, cache)
    view = cache.layers[0].keys[:, :1]
    before = view._version
    step(model, cache)
    assert view._version > before


# Captures that fail.


def test_a_capture_that_fails_leaves_the_cache_and_is_not_tried_again(twin):
    original, model = captured()
    twin.fails = torch.OutOfMemoryError("no memory is left")
    cache, own = begun(model), begun(original)
    for token in range(4):
        found, said = reasons(lambda token=token: step(model, cache, token))
        assert close(found, step(original, own, token))
        assert same_caches(cache, own)
        assert not said if token == 0 else "OutOfMemoryError: no memory is left" in said[0]
    assert twin.captures == 1
    assert not twin.replays


def waits(inner, x, kwargs):
    return inner(x) * (2 if float(x.sum()) > 0 else 3)


def stores(inner, x, kwargs):
    inner.seen = [len(x)]  # equal each time, and another list
    return inner(x)


def copies_a_constant(inner, x, kwargs):
    return inner(x) * torch.tensor([3.0])


@pytest.mark.parametrize(
    ("act", "why"),
    [(waits, "not permitted"), (stores, "stores attributes"), (copies_a_constant, "not permitted")],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_a_graph_cannot_do_is_refused_with_its_reason(twin, act, why):
    original = wrapped("self_attn", "o_proj", act)
    model = flashnorm.capture_(flashnorm.accelerate_(copy.deepcopy(original)))
    cache, own = begun(model), begun(original)
    for token in range(4):
        found, said = reasons(lambda token=token: step(model, cache, token))
        assert close(found, step(original, own, token))
        assert same_caches(cache, own)
        assert not said if token == 0 else why in said[0]
    assert twin.captures == 1
    assert not twin.replays


def test_a_step_that_keeps_what_it_computed_is_not_captured(twin):
    """The model is another one after each step, so that no step is like the one before."""

    def keeps(inner, x, kwargs):
        inner.seen = x
        return inner(x)

    original = wrapped("self_attn", "o_proj", keeps)
    model = flashnorm.capture_(flashnorm.accelerate_(copy.deepcopy(original)))
    run_steps(original, model, lambda _: None)
    assert not twin.replays
    cache = begun(model, length=64)
    said = [reasons(lambda: step(model, cache))[1] for _ in range(40)]
    assert "another one at every step" in said[-1][0]
    assert not twin.replays


def test_a_model_that_writes_into_its_arguments_is_not_captured(twin):
    """A graph would write into its own ones."""
    original, model = captured()
    for each in (original, model):
        embed = each.model.embed_tokens
        each.model.embed_tokens = Wrapped(embed, lambda inner, x, _: inner(x.add_(1).sub_(1)))
        each.model.embed_tokens.eval()
    cache, own = begun(model), begun(original)
    for token in range(3):
        found, said = reasons(lambda token=token: step(model, cache, token))
        assert close(found, step(original, own, token))
        assert not said if token == 0 else "writes into its arguments" in said[0]
    assert not twin.replays


def test_another_setting_of_the_process_is_another_graph(twin, monkeypatch):
    _, model = captured()
    cache = begun(model)
    step(model, cache), step(model, cache)
    monkeypatch.setattr(twin, "settings", lambda: ("tf32",), raising=False)
    step(model, cache)
    assert (twin.captures, twin.replays) == (1, 1)
    step(model, cache)
    assert (twin.captures, twin.replays) == (2, 2)
    torch.set_default_dtype(torch.float64)
    try:
        step(model, cache)
        assert (twin.captures, twin.replays) == (2, 2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_steps_of_two_threads_at_once_are_one_and_the_models_own(twin):
    original, model = captured()
    cache, own = begun(model), begun(original)
    step(model, cache), step(original, own)
    forward = vars(model)["forward"]
    with forward.lock:
        found, said = reasons(lambda: step(model, cache))
    assert close(found, step(original, own))
    assert "another thread" in said[0]
