"""Dynamic Tanh in the place of a norm: on kernels like any other, α looked at like a gain."""

import copy
import pickle

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.kernels import dispatch
from tests.runtime.captured.stepping import begun, same_caches, step, twins
from tests.runtime.models import close, dyt, ids, logits
from tests.test_dyt import Derf

HALVES = [torch.bfloat16, torch.float16]


def accelerated(dtype=torch.float32, **options):
    """(the original, the same model accelerated and past its first call)."""
    original = dyt(dtype)
    model = flashnorm.accelerate_(copy.deepcopy(original), **options)
    logits(model, ids())
    return original, model


def norm_of(model):
    return model.model.layers[0].input_layernorm


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (2, 40)], ids=str)
def test_the_outputs_are_those_of_the_original(shape):
    original, model = accelerated()
    tokens = ids(*shape)
    with dispatch.forbid_fallback():
        found = logits(model, tokens)
    assert close(found, logits(original, tokens))


def test_all_of_a_model_is_on_kernels_and_readers_are_one_call(calls):
    _, model = accelerated()
    parts = {part.path: part for part in flashnorm.acceleration(model).parts}
    assert not any(part.reason for part in parts.values())
    assert parts["model.layers.1.post_attention_layernorm"].precomputed == ("model.layers.1.mlp",)
    calls.clear()
    logits(model, ids(1, 1))
    layer = [(32, 64, 32), (64,), (160,), (64,)]
    assert calls == [*layer, *layer, (256,)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_no_farther_from_the_truth(dtype):
    original, model = accelerated(dtype)
    tokens = ids(2, 4)
    truth = logits(copy.deepcopy(original).double(), tokens)
    with dispatch.forbid_fallback():
        ours = (logits(model, tokens).double() - truth).norm()
    theirs = (logits(original, tokens).double() - truth).norm()
    assert ours < 1.1 * theirs


def in_place(norm):
    norm.alpha.data.mul_(3)


def swapped(norm):
    norm.alpha.data = torch.full((1,), 1.7)


def another(norm):
    norm.alpha = nn.Parameter(torch.full((1,), -0.9))


def no_axis(norm):
    norm.alpha = nn.Parameter(torch.tensor(1.3))


def per_channel(norm):
    norm.alpha = nn.Parameter(torch.linspace(-1, 2, 64))


def more_axes(norm):
    norm.alpha = nn.Parameter(torch.full((1, 1, 1), 1.3))


def one_gain(norm):
    norm.weight = nn.Parameter(torch.full((1,), 0.7))


def computed(norm):
    del norm.alpha
    norm.alpha = torch.full((1,), 1.1)


def loaded(norm):
    norm.load_state_dict({name: p * 2 for name, p in norm.state_dict().items()})


TAKEN = [in_place, swapped, another, no_axis, loaded]
REFUSED = [per_channel, more_axes, one_gain, computed]


@pytest.mark.parametrize("change", [*TAKEN, *REFUSED])
def test_another_alpha_is_seen(change):
    original, model = accelerated()
    before = logits(model, ids())
    change(norm_of(original)), change(norm_of(model))
    expected = logits(original, ids())
    assert not close(before, expected)
    with dispatch.forbid_fallback(change in TAKEN):
        assert close(logits(model, ids()), expected)


@pytest.mark.parametrize("change", REFUSED)
def test_a_backend_that_checks_no_shapes_is_not_asked(change):
    _, model = accelerated()
    change(norm_of(model))
    assert vars(norm_of(model))["forward"].kernel.why_not(torch.randn(1, 64))


def test_alpha_of_another_dtype_is_the_modules_own_code():
    """Rounded to α's dtype by promotion, or not at all where α has no axis."""
    for shape in ((1,), ()):
        original, model = accelerated(torch.bfloat16)
        for m in (original, model):
            norm_of(m).alpha = nn.Parameter(torch.full(shape, 0.7))
        x = torch.randn(1, 2, 64).bfloat16()
        with torch.no_grad():
            assert torch.equal(norm_of(model)(x), norm_of(original)(x))


def test_another_dtype_is_noticed():
    original, model = accelerated()
    model.double(), original.double()
    assert torch.equal(logits(model, ids()), logits(original, ids()))
    model.bfloat16(), original.bfloat16()
    assert close(logits(model, ids()), logits(original, ids()), torch.bfloat16)


def test_hooks_are_seen():
    original, model = accelerated()
    for m in (original, model):
        norm_of(m).register_forward_hook(lambda module, given, output: output.mul_(2))
        other = m.model.layers[1].post_attention_layernorm
        other.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    assert close(logits(model, ids()), logits(original, ids()))


def test_restore_gives_the_original_back():
    original, model = accelerated()
    flashnorm.restore_(model)
    assert torch.equal(logits(model, ids()), logits(original, ids()))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_copies_fold_and_pickle():
    original, model = accelerated(fold=True)
    expected = logits(original, ids())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert close(logits(other, ids()), expected)
        in_place(norm_of(other))
        assert not close(logits(other, ids()), expected)
    assert close(logits(model, ids()), expected)


def test_another_function_than_tanh_is_refused_with_a_reason():
    original = dyt()
    original.model.norm = Derf(64).eval()
    model = flashnorm.accelerate_(copy.deepcopy(original), training=True)
    parts = [p for p in flashnorm.acceleration(model).parts if p.path == "model.norm"]
    assert parts
    assert all("it is not tanh(αx) of its one argument" in part.reason for part in parts)
    assert close(logits(model, ids()), logits(original, ids()))


def test_compiled_graphs_are_those_of_the_original():
    original, model = accelerated()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for change in (lambda norm: None, in_place, another):
        change(norm_of(original)), change(norm_of(model))
        assert close(logits(compiled, ids(1, 1)), logits(original, ids(1, 1)))


@pytest.mark.parametrize("change", [in_place, another, per_channel])
def test_a_step_that_is_captured_has_no_tanh_of_its_own(monkeypatch, change):
    original = dyt()
    with twins(monkeypatch) as backend:
        model = flashnorm.capture_(flashnorm.accelerate_(copy.deepcopy(original)))
        cache, own = begun(model), begun(original)
        for token in range(3):
            backend.calls.clear()
            assert close(step(model, cache, token), step(original, own, token))
            if token == 1:  # it is captured now
                named = [call[0] for call in backend.calls]
                assert named.count("dyt") % 5 == 0
                assert set(named) == {"dyt", "none"}
        change(norm_of(original)), change(norm_of(model))
        for token in range(3):
            assert close(step(model, cache, token), step(original, own, token))
        assert same_caches(cache, own)


def gradients(model):
    model.zero_grad(set_to_none=True)
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("change", [another, no_axis, per_channel, more_axes, one_gain])
def test_gradients_after_a_change(change):
    original, model = accelerated(training=True)
    before = gradients(model)
    change(norm_of(original)), change(norm_of(model))
    found, expected = gradients(model), gradients(original)
    name = "model.layers.0.input_layernorm.alpha"
    assert found[name].shape != before[name].shape or not close(found[name], before[name])
    assert found.keys() == expected.keys()
    assert all(close(found[name], value) for name, value in expected.items())
