"""Generation on an accelerated model: every cache, beams, padding, batches, torch.compile."""

import copy
from collections import Counter

import pytest
import torch
from transformers import DynamicCache, StaticCache

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.kernels.cpu.backend import CPU
from tests.kernels.cases import rows_for_kernels
from tests.runtime.models import LLAMA, QWEN3, close, ids, logits, tiny

# As a compiled graph calls it: without Python where the backend has such an operator.
OPERATORS = {"cpu": "flashnorm.norm_linear_cpu", "numpy": "flashnorm.norm_linear.default"}


def kernels(count):
    return sum(count[name] for name in OPERATORS.values())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_decode_step_calls_the_kernels(dtype, backend):
    original, model = pair()
    original.to(dtype), model.to(dtype)
    logits(model, ids())
    calls = []
    graph = torch.compile(model, fullgraph=True, backend=recorder(calls))
    caches = [StaticCache(config=LLAMA, max_cache_len=16) for _ in range(2)]
    for position in range(4):
        tokens = ids(1, 1, seed=position)
        with torch.no_grad():
            found = graph(tokens, past_key_values=caches[0], use_cache=True).logits
            expected = original(tokens, past_key_values=caches[1], use_cache=True).logits
        assert close(found, expected, dtype)
    count, layers = Counter(calls), LLAMA.num_hidden_layers
    graphs = count["output"]
    each = 4 * layers + 1  # q | k | v, o, gate and up, down; the head
    assert count[OPERATORS[backend.name]] == graphs * each
    assert count["flashnorm.attend_cpu"] == graphs * layers * (backend is CPU)
    assert not count["linear"]


def test_a_compiled_graph_of_any_length_is_made_for_few_rows_and_for_many(monkeypatch):
    rows_for_kernels(monkeypatch, 16)
    original, model = pair()
    original.bfloat16(), model.bfloat16()
    found = {}
    for length in (3, 200):
        calls = []
        graph = torch.compile(model, fullgraph=True, dynamic=True, backend=recorder(calls))
        for more in (0, 1):
            tokens = ids(1, length + more)
            assert close(logits(graph, tokens), logits(original, tokens), torch.bfloat16)
        found[length] = Counter(calls)
        assert found[length]["output"] == 1
    few, many = (kernels(found[length]) for length in (3, 200))
    assert few > many


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_exported_graph_takes_any_length(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 32)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = copy.deepcopy(model)
    flashnorm.accelerate_(model, (torch.randn(2, 32, dtype=dtype),))
    with torch.no_grad():
        length = {0: torch.export.Dim("length", min=2, max=4096)}
        program = torch.export.export(
            model, (torch.randn(3, 32, dtype=dtype),), dynamic_shapes=(length,)
        )
        for rows in (2, 700):
            x = torch.randn(rows, 32, dtype=dtype)
            assert close(program.module()(x), expected(x), dtype)
    assert not any("flashnorm" in str(node.target) for node in program.graph.nodes)


def test_a_compiled_graph_with_gradients_is_the_originals():
    original, model = pair()
    calls = []
    found = torch.compile(model, fullgraph=True, backend=recorder(calls))(ids(1, 1)).logits
    assert torch.equal(found, original(ids(1, 1)).logits)
    assert not [call for call in calls if "flashnorm" in call]


@pytest.mark.parametrize("length", [1, 5])
def test_a_compiled_graph_under_autocast_is_the_originals(length):
    original, model = pair()
    calls = []
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(
            torch.compile(model, fullgraph=True, backend=recorder(calls)), ids(1, length)
        )
        expected = logits(original, ids(1, length))
    assert torch.equal(found, expected)
    assert not [call for call in calls if "flashnorm" in call]


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
