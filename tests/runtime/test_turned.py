"""Layers that hold their weight as [in, out] (GPT-2's): few rows on kernels, many on torch."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import GPT2Config, OpenAIGPTConfig
from transformers.pytorch_utils import Conv1D

import flashnorm
from flashnorm.kernels import dispatch
from tests.errors import relative
from tests.runtime.models import close, ids, logits, tiny
from tests.runtime.test_generate import OPERATORS, recorder

SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
CONFIGS = {"gpt2": GPT2Config(**SIZES), "openai-gpt": OpenAIGPTConfig(**SIZES)}


def pair(config=CONFIGS["gpt2"], dtype=torch.float32, **options):
    """(the original, the same model accelerated)."""
    original = tiny(config, dtype)
    return original, flashnorm.accelerate_(copy.deepcopy(original), **options)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (2, 40)], ids=str)
def test_the_outputs_are_those_of_the_original(name, shape):
    original, model = pair(CONFIGS[name])
    tokens = ids(*shape)
    with dispatch.forbid_fallback():
        found = logits(model, tokens)
    assert close(found, logits(original.double(), tokens))


def test_few_rows_run_on_kernels_and_many_do_not(calls):
    _, model = pair()
    calls.clear()
    logits(model, ids(1, 16))
    layer = [(192,), (64,), (256,), (64,)]
    assert calls == [*layer, *layer, (256,)]
    calls.clear()
    logits(model, ids(1, 17))
    assert set(calls) <= {(256,)}  # the head's weight is held as [out, in]


def test_greedy_tokens_are_the_same():
    original, model = pair()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids(), **options), original.generate(ids(), **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_farther_from_the_truth(dtype):
    original, model = pair(dtype=dtype)
    tokens = ids(2, 8)
    truth = logits(copy.deepcopy(original).double(), tokens)
    with dispatch.forbid_fallback():
        ours = (logits(model, tokens).double() - truth).norm()
    assert ours < 1.1 * (logits(original, tokens).double() - truth).norm()


def test_restore_gives_the_original_back():
    original, model = pair()
    state = original.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    flashnorm.restore_(model)
    assert torch.equal(logits(model, ids()), logits(original, ids()))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_weight_may_move_and_change_its_shape_and_strides():
    original, model = pair()
    logits(model, ids())
    for each in (original, model):
        for module in each.modules():
            if isinstance(module, Conv1D):
                module.weight.data = module.weight.data.flip(0).clone()
    assert close(logits(model, ids()), logits(original, ids()))
    for each in (original, model):
        for module in each.modules():
            if isinstance(module, Conv1D):  # which the kernels for the other layout read
                module.weight = nn.Parameter(module.weight.data.T.contiguous().T)
    with dispatch.forbid_fallback():
        found = logits(model, ids())
    assert close(found, logits(original, ids()))


def test_the_dtype_may_change():
    original, model = pair()
    with dispatch.forbid_fallback():
        found = logits(model.to(torch.bfloat16), ids())
    assert close(found, logits(original.bfloat16().double(), ids()), torch.bfloat16)


def test_a_gradient_is_that_of_the_original():
    for training in (False, True):
        original, model = pair(training=training)
        for each in (original, model):
            each(ids(), use_cache=False).logits.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
            assert relative(p.grad, q.grad) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_graph_calls_the_kernels(dtype, backend):
    original, model = pair(dtype=dtype)
    made = []
    compiled = torch.compile(model, fullgraph=True, backend=recorder(made))
    for length in (1, 3):
        tokens = ids(1, length)
        assert close(logits(compiled, tokens), logits(original, tokens), dtype)
    count = Counter(made)
    # Four in each of two layers, and the head.
    assert count[OPERATORS[backend.name]] == 9 * count["output"]
    assert not count["addmm"]


def test_a_compiled_graph_runs():
    original, model = pair()
    compiled = torch.compile(model, backend="aot_eager")
    assert close(logits(compiled, ids()), logits(original, ids()))


class Both(nn.Module):
    """One norm with readers of both layouts, one of which is square."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 24)
        self.c, self.d = Conv1D(64, 64), Conv1D(40, 64)

    def forward(self, x):
        z = self.norm(x)
        return torch.cat([self.a(z), self.b(z), self.c(z), self.d(z)], -1)


def test_one_norm_with_readers_of_both_layouts(calls):
    torch.manual_seed(0)
    original = Both().eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(3, 64)
    model = flashnorm.accelerate_(copy.deepcopy(original), {"x": x})
    with torch.no_grad(), dispatch.forbid_fallback():
        found = model(x)
        assert close(found, original.double()(x.double()))
    assert calls == [(64, 24), (64, 40)]
