"""`capture_`: whatever changes between two steps is noticed, and it can be taken away again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import flashnorm
from flashnorm.kernels import dispatch
from tests.runtime.captured.stepping import (
    FIXED,
    GREEDY,
    begun,
    captured,
    reasons,
    run_steps,
    step,
)
from tests.runtime.models import close, ids, tiny

# What changes between steps.


def test_weights_that_are_changed_in_place_are_read(twin):
    @torch.no_grad()
    def change(model):
        model.model.layers[1].mlp.down_proj.weight.mul_(-3)
        model.model.layers[0].input_layernorm.weight.data.flip(0).clone()
        model.model.norm.weight.data.add_(1)
        model.lm_head.weight.data[3:9] = 0.5

    with dispatch.forbid_fallback():
        assert run_steps(*captured(), change) == [[], [], []]
    assert twin.captures == 1


REPLACED = {
    "data": lambda m: setattr(
        m.model.norm.weight, "data", m.model.norm.weight.data.flip(0).clone()
    ),
    "a parameter": lambda m: setattr(
        m.model.layers[0].self_attn.o_proj, "weight", torch.nn.Parameter(torch.ones(64, 64) / 9)
    ),
    "a buffer": lambda m: setattr(
        m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq.clone() * 2
    ),
    "eps": lambda m: setattr(m.model.norm, "variance_epsilon", 3.0),
    "an activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.Tanh().eval()),
    "a scale": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.9),
    "fewer layers": lambda m: m.model.layers.__delitem__(1),
    "a module": lambda m: setattr(
        m.model.layers[1].self_attn, "o_proj", torch.nn.Identity().eval()
    ),
}


@pytest.mark.parametrize("change", REPLACED)
def test_what_is_replaced_is_noticed_and_captured_anew(twin, change):
    """The first step after it is the model's own, with its reason; then another graph is made."""
    original, model = captured()
    said = run_steps(original, model, REPLACED[change])
    assert len(said[0]) == 1
    assert not said[1]
    if change != "fewer layers":  # whose cache has a layer that nobody fills
        assert not said[2]
        assert twin.captures == 2


def test_a_forward_that_somebody_gave_a_layer_runs_in_the_graph(twin):
    original, model = captured()
    for each in (original, model):
        layer = each.model.layers[1].mlp.down_proj
        layer.forward = lambda x, w=layer: torch.nn.functional.linear(x, w.weight) * 3
    run_steps(original, model, lambda _: None)
    assert twin.replays


def test_hooks_are_called(twin):
    original, model = captured()
    handles = []

    def change(m):
        handles.append(m.model.layers[1].mlp.register_forward_hook(lambda _, __, y: y * 0))

    assert all(said and "hooks" in said[0] for said in run_steps(original, model, change))
    for handle in handles:
        handle.remove()
    before = twin.replays
    assert run_steps(original, model, lambda _: None)[1:] == [[], []]
    assert twin.replays > before


def test_a_hook_on_the_model_itself_is_called(twin):
    _, model = captured()
    seen = []
    model.register_forward_hook(lambda _, __, out: seen.append(out.logits.shape))
    cache = begun(model)
    for _ in range(3):
        step(model, cache)
    assert len(seen) == 4
    assert twin.replays == 2


def test_adapters(twin):
    peft = pytest.importorskip("peft")
    original, model = captured()
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    own = peft.get_peft_model(original, config).eval()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    found = adapted.generate(input_ids=ids(), **FIXED)
    assert torch.equal(found, own.generate(input_ids=ids(), **FIXED))


class Tripled(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return found * 3 if function is torch.nn.functional.silu else found


def overridden(act):
    with Tripled():
        return act()


def inference(act):
    with torch.inference_mode():
        return act()


@pytest.mark.parametrize(
    ("mode", "why"),
    [(overridden, "TorchFunctionMode"), (inference, "inference_mode")],
    ids=["function mode", "inference"],
)
def test_modes_run_the_models_own_code(mode, why):
    original, model = captured()
    cache, own = begun(model), begun(original)
    for _ in range(2):
        step(model, cache), step(original, own)
    found, said = reasons(lambda: mode(lambda: step(model, cache)))
    assert close(found, mode(lambda: step(original, own)), found.dtype)
    assert why in said[0]


def test_a_gradient_is_the_models_own():
    original, model = captured()
    cache = begun(model)
    step(model, cache), step(model, cache)
    for each in (original, model):
        given = copy.deepcopy(cache)
        each(torch.full((1, 1), 7), past_key_values=given).logits.square().sum().backward()
    pairs = zip(original.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_gradients_have_to_be_off(twin):
    """Where none is wanted as well: what runs then is not what was captured."""
    original, model = captured()
    for each in (original, model):
        each.requires_grad_(False)
    cache, own = begun(model), begun(original)
    token = torch.full((1, 1), 7)
    for _ in range(3):
        found, said = reasons(lambda: model(token, past_key_values=cache).logits)
        assert close(found, original(token, past_key_values=own).logits)
        assert "use torch.no_grad()" in said[0]
    assert not twin.captures


def test_training_is_the_models_own(twin):
    original, model = captured()
    said = run_steps(original, model, lambda m: m.model.layers[0].train())
    assert all(said)
    assert twin.captures == 1
    original.eval(), model.eval()
    run_steps(original, model, lambda _: None)
    assert twin.captures == 2


def test_a_model_that_begins_in_training_is_captured_once_it_is_not(twin):
    original, model = captured()
    model.train()
    cache = begun(model)
    for _ in range(3):
        assert "another mode" in reasons(lambda: step(model, cache))[1][0]
    assert not twin.captures
    model.eval()
    run_steps(original, model, lambda _: None)
    assert twin.replays


# The model as a whole.


def test_it_says_so_and_can_be_put_back(twin):
    original, model = captured(graphs=3)
    assert "decode steps are captured: on static caches, by replaying up to 3 graphs" in str(
        flashnorm.acceleration(model)
    )
    forward = vars(model)["forward"]
    cache = begun(model)
    step(model, cache), step(model, cache)
    flashnorm.restore_(model)
    assert "forward" not in vars(model)
    assert "get_compiled_call" not in vars(model)
    assert torch.equal(model.generate(ids(), **FIXED), original.generate(ids(), **FIXED))
    cache, own = begun(model), begun(original)
    before = twin.replays
    with torch.no_grad():  # whoever still holds the forward has the model's own
        a = forward(torch.full((1, 1), 7), past_key_values=cache).logits
    assert torch.equal(a, step(original, own))
    assert twin.replays == before


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_capture_their_own_steps(twin, twice):
    original, model = captured()
    model.generate(ids(), **FIXED)
    again, before = twice(model), twin.replays
    with dispatch.forbid_fallback():
        found = again.generate(ids(), **FIXED)
    assert torch.equal(found, original.generate(ids(), **FIXED))
    assert twin.replays == before + GREEDY["max_new_tokens"] - 2
    with torch.no_grad():
        again.model.norm.weight.mul_(-1)
    assert torch.equal(model.generate(ids(), **FIXED), original.generate(ids(), **FIXED))
    flashnorm.restore_(again)
    assert "get_compiled_call" not in vars(again)


def test_inside_of_original_nothing_is_captured(twin):
    original, model = captured()
    with flashnorm.original(model):
        cache, own = begun(model), begun(original)
        for _ in range(3):
            assert torch.equal(step(model, cache), step(original, own))
    assert not twin.captures
    for _ in range(3):
        assert close(step(model, cache), step(original, own))
    assert twin.replays == 2


def test_generate_compiles_only_where_it_is_told_how(monkeypatch):
    _, model = captured()
    assert model.get_compiled_call(None) == model.__call__
    seen = []
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, c: seen.append((self, c)))
    model.get_compiled_call("how")
    assert seen == [(model, "how")]


def test_what_cannot_be_captured_says_why(backend, monkeypatch):
    model = tiny()
    with pytest.raises(flashnorm.FlashNormError, match="call accelerate_ before capture_"):
        flashnorm.capture_(model)
    flashnorm.accelerate_(model)
    with pytest.raises(flashnorm.FlashNormError, match="have to be kept, not 0"):
        flashnorm.capture_(model, graphs=0)
    model.forward = model.forward
    with pytest.raises(flashnorm.FlashNormError, match="another one than its own"):
        flashnorm.capture_(model)
    del model.forward
    flashnorm.capture_(model)
    with pytest.raises(flashnorm.FlashNormError, match="captured already"):
        flashnorm.capture_(model)
    dispatch.unregister(backend)
    try:
        model = flashnorm.accelerate_(tiny())
        with pytest.raises(flashnorm.FlashNormError, match="the backend captures no steps"):
            flashnorm.capture_(model)
    finally:
        dispatch.register(backend)
