"""Generation on an accelerated model: every cache, beams, padding, batches, torch.compile."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import flashnorm
from flashnorm.kernels import cpu, dispatch
from tests.runtime.models import LLAMA, QWEN3, close, ids, logits, tiny

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason="no compiled kernels here")


def pair(config=LLAMA):
    original = tiny(config)
    model = flashnorm.accelerate_(copy.deepcopy(original))
    logits(model, ids())
    return original, model


def generate(model, tokens, **options):
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}
    return model.generate(tokens, **options)


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_are_the_same(config, cache):
    original, model = pair(config)
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with dispatch.forbid_fallback():
        found = generate(model, ids(), **options)
    assert torch.equal(found, generate(original, ids(), **options))


def test_beams_are_the_same():
    original, model = pair()
    expected = generate(original, ids(2, 5), num_beams=3)
    assert torch.equal(generate(model, ids(2, 5), num_beams=3), expected)


def test_a_padded_batch_is_the_same():
    original, model = pair()
    tokens = ids(3, 6)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 2, 4)):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    expected = generate(original, tokens, attention_mask=mask)
    assert torch.equal(generate(model, tokens, attention_mask=mask), expected)


def test_samples_of_one_seed_are_the_same():
    original, model = pair()
    found = []
    for m in (original, model):
        torch.manual_seed(0)
        found.append(generate(m, ids(), do_sample=True, top_k=20))
    assert torch.equal(*found)


def test_compiled_as_one_graph():
    original, model = pair()
    compiled = torch.compile(model, fullgraph=True)
    assert close(logits(compiled, ids()), logits(original, ids()))


def test_a_compiled_decode_step_calls_the_kernels():
    original, model = pair()
    original.bfloat16(), model.bfloat16()
    logits(model, ids())
    calls = []
    graph = torch.compile(model, fullgraph=True, backend=recorder(calls))
    caches = [StaticCache(config=LLAMA, max_cache_len=16) for _ in range(2)]
    for position in range(4):
        tokens = ids(1, 1, seed=position)
        with torch.no_grad():
            found = graph(tokens, past_key_values=caches[0], use_cache=True).logits
            expected = original(tokens, past_key_values=caches[1], use_cache=True).logits
        assert close(found, expected, torch.bfloat16)
    assert sum("flashnorm.norm_linear" in call for call in calls) >= 11


def recorder(calls):
    """A compiler that runs the graph as it is, and writes down what it calls."""

    def compile_(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    return compile_


def test_a_loop_of_forwards_is_the_same():
    original, model = pair()
    found = []
    for m in (original, model):
        cache, tokens, made = DynamicCache(config=LLAMA), ids(), []
        with torch.no_grad():
            for _ in range(16):
                output = m(tokens, past_key_values=cache, use_cache=True)
                tokens = output.logits[:, -1:].argmax(-1)
                made.append(int(tokens))
        found.append(made)
    assert found[0] == found[1]
