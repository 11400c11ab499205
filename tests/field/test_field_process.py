"""What stands around a model in its process: default devices, modes that see every function."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import flashnorm
from flashnorm.graph.ambient import on_cpu
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu.attention import attend
from flashnorm.kernels.dispatch import forbid_fallback
from flashnorm.runtime.accelerate import acceleration
from tests.field.modules import Block, Glu, N, random_
from tests.runtime.models import close, ids, logits, tiny

needs_kernels = pytest.mark.skipif(not cpu.available()[0], reason="no kernels here")
EXAMPLE = (torch.randn(2, 3, N),)


def layered():
    return random_(nn.Sequential(Block(), nn.Linear(N + 192, N), Block(reader=Glu())))


@pytest.fixture
def default():
    """Sets the default device, of which nothing is left after the test."""
    yield torch.set_default_device
    torch.set_default_device(None)


class Twice(TorchFunctionMode):
    """Doubles one function of torch, and counts all."""

    def __init__(self, function=F.linear):
        super().__init__()
        self.function, self.seen = function, Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen[function] += 1
        y = function(*args, **(kwargs or {}))
        return y * 2 if function is self.function else y


@needs_kernels
@pytest.mark.parametrize("rows", [1, 200])
@torch.no_grad()
def test_kernels_return_what_is_beside_x(rows, default):
    model = layered()
    x = torch.randn(rows, N)
    flashnorm.accelerate_(model, EXAMPLE)
    assert any(part.precomputed for part in acceleration(model).fused)
    expected = model(x)
    for device in ("meta", "cpu"):
        default(device)
        with forbid_fallback():
            assert torch.equal(model(x), expected)
            with torch.device("meta"):
                assert torch.equal(model(x), expected)


@needs_kernels
def test_attention_returns_what_is_beside_q():
    q, k, v = (torch.randn(1, heads, length, 8) for heads, length in ((4, 1), (2, 5), (2, 5)))
    expected = attend(q, k, v, 0.5)
    with torch.device("meta"):
        assert torch.equal(attend(q, k, v, 0.5), expected)


def test_an_analysis_is_the_same_whatever_the_default_device_is(default):
    for model, example in ((layered(), EXAMPLE), (tiny(), None)):
        here, there = copy.deepcopy(model), copy.deepcopy(model)
        plan = flashnorm.folding(flashnorm.fold_(here, example, center=True))
        flashnorm.accelerate_(here, example)
        default("meta")
        assert str(flashnorm.inspect(there, example, center=True)) == str(plan)
        assert flashnorm.folding(flashnorm.fold_(there, example, center=True)) == plan
        flashnorm.accelerate_(there, example)
        assert str(acceleration(there)) == str(acceleration(here))
        for own, other in zip(here.state_dict().values(), there.state_dict().values(), strict=True):
            assert torch.equal(own, other)
        flashnorm.restore_(there)
        flashnorm.unfold_(there)
        flashnorm.accelerate_(there, example, training=True)
        assert torch.get_default_device().type == "meta"
        default(None)


def test_a_checkpoint_is_folded_the_same_whatever_the_default_device_is(tmp_path, default):
    tiny().half().save_pretrained(tmp_path / "model")
    flashnorm.fold_checkpoint(tmp_path / "model", tmp_path / "here")
    plan = flashnorm.inspect(tmp_path / "model")
    default("meta")
    flashnorm.fold_checkpoint(tmp_path / "model", tmp_path / "there")
    assert flashnorm.inspect(tmp_path / "model") == plan
    for file in (tmp_path / "here").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()
    assert flashnorm.verify(tmp_path / "model", tmp_path / "there", tokens=4).ok


class SetsDevice(Block):
    """A forward that sets a default device, as scripts do."""

    def forward(self, x):
        torch.set_default_device("meta")
        return super().forward(x)


@pytest.mark.parametrize("before", [None, "cpu"])
def test_a_recording_leaves_the_default_device_as_it_was(before, default):
    model = random_(SetsDevice())
    default(before)
    modes = torch._C._len_torch_function_stack()
    flashnorm.inspect(model, EXAMPLE)
    assert torch.get_default_device().type == "cpu"
    assert torch._C._len_torch_function_stack() == modes == (before is not None)


def test_nothing_is_put_around_an_analysis_that_is_on_the_cpu():
    with on_cpu():
        assert torch._C._len_torch_function_stack() == 0
    with torch.device("meta"), on_cpu():
        assert torch.ones(1).device.type == "cpu"


@torch.no_grad()
def test_a_mode_that_changes_a_function_changes_an_accelerated_model():
    model, x = layered(), torch.randn(2, N)
    original = copy.deepcopy(model)
    flashnorm.accelerate_(model, EXAMPLE)
    with Twice() as seen:
        expected = original(x)
    with Twice() as found:
        assert torch.equal(model(x), expected)
    assert found.seen[F.linear] == seen.seen[F.linear]
    with torch.device("cpu"), Twice():
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_a_mode_that_begins_between_a_norm_and_its_reader_is_seen():
    model = random_(Block())
    original = copy.deepcopy(model)
    flashnorm.accelerate_(model, EXAMPLE)
    x = torch.randn(1, N)
    z = model.norm(x)
    with Twice():
        assert torch.equal(model.mix.q(z), original.mix.q(z))


def test_a_mode_is_seen_by_what_saves_less_for_a_gradient():
    model = layered()
    original = copy.deepcopy(model)
    flashnorm.accelerate_(model, EXAMPLE, training=True)
    x = torch.randn(2, N)
    with Twice():
        expected, found = original(x), model(x)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for own, other in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@torch.no_grad()
def test_a_mode_that_changes_attention_is_seen():
    model = tiny()
    original = copy.deepcopy(model)
    flashnorm.accelerate_(model)
    found = []
    for each in (original, model):
        with Twice(F.scaled_dot_product_attention):
            cache = each(ids(), use_cache=True).past_key_values
            found.append(each(ids(length=1), past_key_values=cache).logits)
    assert torch.equal(*found)


@torch.no_grad()
def test_a_mode_is_seen_by_a_compiled_graph():
    model = random_(Block())
    original = copy.deepcopy(model)
    flashnorm.accelerate_(model, EXAMPLE)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(1, N)
    plain = compiled(x)
    with Twice():
        expected = original(x)
        assert close(compiled(x), expected)
    assert not close(expected, plain)
    assert torch.equal(compiled(x), plain)


@torch.no_grad()
def test_logits_are_the_same_with_a_default_device_that_is_set():
    model = tiny()
    flashnorm.accelerate_(model)
    expected = logits(model, ids())
    with torch.device("cpu"):
        assert torch.equal(logits(model, ids()), expected)
