"""What a module reads is what it was recorded with, or the module runs itself."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.kernels.cpu import calls as cpu
from tests.field.modules import (
    Glu,
    Held,
    M,
    N,
    Odd,
    Two,
    close,
    inputs,
    pair,
    parts,
    random_,
    run,
    same,
)
from tests.runtime.models import ids, logits, tiny

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason="no compiled kernels here")
DTYPES = [torch.float32, torch.bfloat16]
STEER = torch.linspace(-1, 1, N)


class Dropped(nn.Linear):
    def forward(self, x):
        return F.linear(F.dropout(x, 0.5, self.training), self.weight, self.bias)


class DroppedNorm(nn.LayerNorm):
    def __init__(self, n):
        super().__init__(n)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x))


class Unmerged(nn.Linear):
    """As loralib's: the update is in the weight in evaluation, beside it in training."""

    def __init__(self):
        super().__init__(N, M)
        self.a, self.b = nn.Parameter(torch.randn(4, N)), nn.Parameter(torch.randn(M, 4))
        self.merged = True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "norm", "gated"])
def test_field_monte_carlo_dropout(kind, dtype):
    norm = DroppedNorm(N) if kind == "norm" else nn.LayerNorm(N)
    reader = {"linear": lambda: Dropped(N, M), "gated": lambda: Glu(nn.SiLU())}
    model = Two(norm, reader.get(kind, lambda: nn.Linear(N, M))())
    if kind == "gated":
        model.reader.gate = Dropped(N, M)
    original, fast = pair(model, dtype)
    for mode in (True, False, True):
        original.train(mode), fast.train(mode)
        found = []
        for each in (original, fast):
            torch.manual_seed(3)
            found.append(run(each, inputs(2, dtype)))
        assert close(found[1], found[0], dtype), mode


def test_field_a_branch_that_a_flag_chooses():
    original, fast = pair(Two(nn.LayerNorm(N), Unmerged()))
    for merged in (False, True):
        for model in (original, fast):
            model.reader.merged = merged
        same(original, fast)


# One model, one answer.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_field_the_first_call_is_like_all_others(dtype):
    fast = flashnorm.accelerate_(tiny(dtype=dtype))
    first = logits(fast, ids(1, 3))
    assert all(torch.equal(logits(fast, ids(1, 3)), first) for _ in range(3))


def test_field_the_first_call_in_another_dtype_is_like_all_others():
    original = tiny()
    fast = flashnorm.accelerate_(copy.deepcopy(original))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        original.to(dtype), fast.to(dtype)
        first = logits(fast, ids())
        assert torch.equal(logits(fast, ids()), first)
        with dispatch.forbid_fallback():
            assert torch.equal(logits(fast, ids()), first)


def test_field_generating_twice_gives_one_text():
    fast = flashnorm.accelerate_(tiny(dtype=torch.bfloat16))
    texts = [fast.generate(ids(1, 4), max_new_tokens=24, do_sample=False) for _ in range(2)]
    scores = []
    other = flashnorm.accelerate_(tiny(dtype=torch.bfloat16))
    for _ in range(2):
        given = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        scores.append(torch.stack(other.generate(ids(1, 4), output_logits=True, **given).logits))
    assert torch.equal(*texts)
    assert torch.equal(*scores)


class Widening(nn.Linear):
    """Returns float32 where it is given less."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias).float()


def test_field_a_dtype_that_is_not_returned_is_learnt_without_a_call():
    original, fast = pair(Two(nn.LayerNorm(N), Widening(N, M)))
    same(original, fast)
    original.bfloat16(), fast.bfloat16()
    for _ in range(2):
        x = inputs(2, torch.bfloat16)
        assert run(fast, x).dtype == torch.float32
        assert close(run(fast, x), run(original, x), torch.bfloat16)


# What a module reads at each call.


@pytest.mark.parametrize("affine", [True, False])
def test_field_an_eps_that_depends_on_the_dtype(affine):
    model = random_(Two(nn.RMSNorm(N, elementwise_affine=affine), nn.Linear(N, M)), torch.float64)
    original = copy.deepcopy(model)
    fast = flashnorm.accelerate_(model, (inputs(dtype=torch.float64),))
    original.float(), fast.float()
    x = inputs(2) * 1e-4
    for _ in range(2):
        assert close(run(fast, x), run(original, x))
    assert fast.norm.forward.dtypes.get(torch.float32, "") != ""


def test_field_an_eps_that_is_changed_later():
    original = tiny()
    fast = flashnorm.accelerate_(copy.deepcopy(original))
    logits(fast, ids())
    for eps in (0.5, 1e-6):
        for model in (original, fast):
            model.model.layers[0].input_layernorm.variance_epsilon = eps
            model.model.layers[1].post_attention_layernorm.variance_epsilon = eps
        assert close(logits(fast, ids()), logits(original, ids()))
    with dispatch.forbid_fallback():
        logits(fast, ids())


class Configured(nn.Module):
    """A norm that reads its eps from an object, and a global."""

    def __init__(self, config):
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.ones(N))

    def forward(self, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps)
        return x * scale * self.weight if SCALED else x * scale


class Config:
    eps = 0.1

    def __init__(self):
        self.eps, self.other = 0.2, []


SCALED = True


def test_field_an_eps_that_an_object_has(monkeypatch):
    original, fast = pair(Two(Configured(Config()), nn.Linear(N, M)))
    for model in (original, fast):
        model.norm.config.eps = 2.0
    same(original, fast)
    monkeypatch.setattr(sys.modules[__name__], "SCALED", False)
    same(original, fast)


def test_field_a_class_that_is_patched_later(monkeypatch):
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    original, fast = pair(Two(nn.LayerNorm(N), Mine(N, M)))
    monkeypatch.setattr(Mine, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
    same(original, fast)
    same(original, copy.deepcopy(fast))


def test_field_a_bias_that_comes_later():
    original, fast = pair(Two(nn.LayerNorm(N), nn.Linear(N, M, bias=False)))
    bias = torch.randn(M)
    for model in (original, fast):
        model.reader.bias = nn.Parameter(bias.clone())
    same(original, fast)


def test_field_a_weight_whose_memory_is_read_in_another_order():
    original, fast = pair(Two(nn.LayerNorm(N), nn.Linear(N, N)))
    for model in (original, fast):
        model.reader.weight.data = model.reader.weight.data.t()
    same(original, fast)


def test_field_a_reader_that_was_replaced_is_not_computed(monkeypatch):
    """By a quantizer, say, which exchanges linear layers later."""
    original, fast = pair(Two(nn.LayerNorm(N), nn.Linear(N, M)))
    other = random_(nn.Linear(N, M), seed=9)
    for model in (original, fast):
        model.reader = copy.deepcopy(other)
    widths = []
    kernel = cpu.run_packed
    monkeypatch.setattr(cpu, "run_packed", lambda *a: widths.append(a[2]) or kernel(*a))
    same(original, fast)
    assert widths == []


class Counting(nn.LayerNorm):
    """A norm that does something beside: it counts its calls."""

    def __init__(self, n, how):
        super().__init__(n)
        self.how = how
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.number = 0

    def forward(self, x):
        if self.how == "buffer":
            self.calls += 1
        else:
            self.number = self.number + 1
        return super().forward(x)


@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_field_a_module_that_does_something_beside(how):
    original, fast = pair(Two(Counting(N, how), nn.Linear(N, M)))
    before = int(fast.norm.calls), fast.norm.number
    run(fast, inputs())
    after = int(fast.norm.calls), fast.norm.number
    assert sum(after) == sum(before) + 1
    same(original, fast)


# Gains and biases are what the graph says.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["bias", "flip"])
def test_field_gains_and_biases_are_what_the_graph_says(how, dtype):
    original, fast = pair(Two(Held(how), nn.Linear(N, M)), dtype)
    same(original, fast, dtype)
    assert parts(fast)["norm"].reason


@pytest.mark.parametrize("how", ["axis", "narrow", "rows"])
def test_field_products_are_what_the_graph_says(how):
    original, fast = pair(Two(nn.LayerNorm(N), Odd(how)))
    same(original, fast)
    assert parts(fast)["reader"].reason


# Where a model lives, and in what state.
