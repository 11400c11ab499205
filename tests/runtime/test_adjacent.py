"""Weights as views of one buffer: the same model, which a library multiplies with fewer calls."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import flashnorm
from flashnorm.kernels import dispatch, norms, ops
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import matmul
from flashnorm.kernels.weights import joined
from tests.kernels.cases import random
from tests.runtime.models import LLAMA, NEOX, QWEN3, close, ids, logits, tiny

F32 = torch.float32


def laid_out(config=LLAMA):
    original = tiny(config, torch.float32)
    model = copy.deepcopy(original)
    before = list(model.parameters())
    flashnorm.accelerate_(model, adjacent_weights=True)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    return original, model


def same_state(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def readers(model):
    """The weights that share x, layer by layer, in the order of their places in memory."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [mlp.gate_proj, mlp.up_proj],
        ):
            yield sorted((each.weight for each in group), key=torch.Tensor.storage_offset)


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_they_lie_behind_each_other_and_are_what_they_were(config):
    original, model = laid_out(config)
    for group in readers(model):
        whole = joined(group)
        assert whole is not None
        assert torch.equal(whole, torch.cat(list(group)))
    assert all(joined(group) is None for group in readers(original))
    assert same_state(model, original)
    for shape in ((1, 1), (2, 40)):
        assert close(logits(model, ids(*shape)), logits(original, ids(*shape)))


def test_a_model_without_such_weights_is_left_alone():
    """One matrix for q, k and v, and a plain feed-forward network."""
    original, model = laid_out(NEOX)
    assert same_state(model, original)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_restored_every_parameter_has_memory_of_its_own():
    original, model = laid_out()
    flashnorm.restore_(model)
    assert same_state(model, original)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert torch.equal(logits(model, ids()), logits(original, ids()))


def test_saved_copied_and_moved(tmp_path):
    original, model = laid_out()
    save_file(dict(model.model.layers.state_dict()), tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    expected = original.model.layers.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert same_state(again, original)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.5 * sum(
        value.nbytes for value in original.state_dict().values()
    )
    twin = pickle.loads(pickle.dumps(model))
    assert close(logits(twin, ids()), logits(original, ids()))
    assert same_state(copy.deepcopy(model), original)
    halved = model.to(torch.bfloat16)
    assert same_state(halved, original.to(torch.bfloat16))


def test_a_value_that_is_written_is_written_once():
    original, model = laid_out()
    with torch.no_grad():
        for each in (original, model):
            each.model.layers[0].self_attn.k_proj.weight.mul_(2)
    assert same_state(model, original)


def test_a_failure_leaves_the_memory_as_it_was(monkeypatch):
    from flashnorm.runtime import accelerate

    model = tiny(LLAMA, torch.float32)
    original = copy.deepcopy(model)

    def fails(*_):
        raise RuntimeError("no attention today")

    monkeypatch.setattr(accelerate, "_attend", fails)
    with pytest.raises(RuntimeError, match="no attention today"):
        flashnorm.accelerate_(model, adjacent_weights=True)
    assert same_state(model, original)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_what_does_not_lie_behind_is_not_joined():
    whole = random(7, 4, dtype=F32, seed=1)
    first, second, third = whole.split([2, 3, 2])
    assert torch.equal(joined([first, second, third]), whole)
    assert torch.equal(joined([second, third]), whole[2:])
    for group in (
        [second, first],
        [first, third],
        [first, second.clone()],
        [first, first],
        [first, second[:, :2]],
        [whole[:2].view(-1), second],
        [first, second.bfloat16()],
    ):
        assert joined(group) is None


@pytest.mark.parametrize("biased", [False, True])
def test_one_product_of_a_library_takes_them_all(biased, monkeypatch):
    """And weights that do not lie so, or of which only some have a bias, are multiplied alone."""
    x, whole, bias = (
        random(20, 16, dtype=F32),
        random(12, 16, dtype=F32, seed=1),
        random(12, dtype=F32, seed=2),
    )
    weights, biases = whole.split([4, 8]), bias.split([4, 8])
    made = []
    monkeypatch.setattr(F, "linear", lambda *args, run=F.linear: made.append(1) or run(*args))
    given = list(biases) if biased else [None, None]
    for some, vectors, calls in (
        (weights, given, 1),
        ([w.clone() for w in weights], given, 2),
        (weights, [biases[0], None], 2),
    ):
        made.clear()
        found = matmul.products(x, some, vectors)
        assert len(made) == calls
        for y, w, c in zip(found, weights, vectors, strict=True):
            expected = x.double() @ w.double().T + (0 if c is None else c.double())
            assert close(y, expected.to(y.dtype))


def test_results_of_the_operator_are_dense(monkeypatch):
    """A compiled graph is told so, whatever a backend returns."""
    x, whole = random(20, 16, dtype=F32), random(12, 16, dtype=F32, seed=1)
    weights = whole.split([4, 8])

    def beside_each_other(call):
        return matmul.products(call.x, call.weights, [None, None])

    monkeypatch.setattr(dispatch, "norm_linear", beside_each_other)
    found = ops.run(Call(x, weights, None, norms.NONE))
    assert not any(y.is_contiguous() for y in beside_each_other(Call(x, weights)))
    assert all(y.is_contiguous() for y in found)
