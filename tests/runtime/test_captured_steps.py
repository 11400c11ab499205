"""`capture_`: tokens and caches of captured steps are the model's own, and so is all else.

On a twin of CUDA graphs: see tests/toys/twin.py.
"""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, MistralConfig, StaticCache

import flashnorm
from flashnorm.kernels import dispatch
from tests.runtime.models import LLAMA, NEOX, QWEN3, SIZES, close, ids, tiny
from tests.toys.twin import TwinBackend, unwatched

MISTRAL = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
GEMMA2 = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=8)
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gpt_neox": NEOX}
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
FIXED = {**GREEDY, "cache_implementation": "static"}


@pytest.fixture(autouse=True, params=["twin"])
def backend(monkeypatch):
    """The only one of these tests."""
    found = TwinBackend()
    dispatch.register(found)
    unwatched(monkeypatch, found.captures)
    yield found
    dispatch.unregister(found)


@pytest.fixture
def twin(backend):
    return backend.captures


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
    with dispatch.forbid_fallback():
        found = model.generate(ids(), **FIXED)
    assert torch.equal(found, original.generate(ids(), **GREEDY))
    assert twin.replays == GREEDY["max_new_tokens"] - 3


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


# What runs in a captured step.


def kernels(backend, model):
    """The kernels that are in the graph of a step."""
    cache = begun(model)
    step(model, cache)
    before = backend.captures.captures
    backend.calls.clear()
    with dispatch.forbid_fallback():
        step(model, cache)
    passes = backend.captures.captures - before
    count, rest = divmod(len(backend.calls), passes)
    assert not rest
    return backend.calls[-count:]


LAYER = [("rms", 32, 64, 32), ("none", 64, "residual"), ("rms", 160, 160), ("none", 64, "residual")]


def test_a_captured_layer_has_four_kernels_and_no_norm_alone(backend):
    """The head reads a part of the last norm's output, so that one is a kernel."""
    _, model = captured()
    named = [tuple(sorted(call[1:], key=str)) for call in LAYER]
    found = kernels(backend, model)
    assert [tuple(sorted(call[1:], key=str)) for call in found] == [*named, *named, ()]
    assert [call[0] for call in found] == [call[0] for call in (*LAYER, *LAYER)] + ["rms"]


def test_outside_of_steps_nothing_is_another_kernel_than_before(backend):
    """Bit for bit what `accelerate_` alone computes, with the same calls."""
    original, model = captured()
    plain = flashnorm.accelerate_(copy.deepcopy(original))
    step(model, begun(model)), step(plain, begun(plain))
    made = []
    for each in (model, plain):
        cache = begun(each)
        backend.calls.clear()
        first = step(each, cache)
        made.append((first, [c for c in backend.calls if "residual" not in c]))
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
    layer = model.model.layers[0]
    assert "forward" not in vars(layer.self_attn.o_proj)


def test_of_two_products_that_are_added_one_is(backend):
    """GPT-NeoX adds attention and MLP to each other, and then to the residual."""
    _, model = captured(NEOX)
    layer = [("layer", 192), ("layer", 160), ("none", 64, "residual")]
    assert kernels(backend, model) == [*layer, *layer, ("layer",)]


class Wrapped(torch.nn.Module):
    """A module inside of another one, which does what a test wants with what it is given."""

    def __init__(self, inner, act):
        super().__init__()
        self.inner, self.act = inner, act

    def forward(self, hidden_states, **kwargs):
        return self.act(self.inner, hidden_states, kwargs)


def reads_before(inner, x, kwargs):
    mean = x.mean(-1, keepdim=True)
    out, more = inner(hidden_states=x, **kwargs)
    return out + mean, more


def reads_after(inner, x, kwargs):
    out, more = inner(hidden_states=x, **kwargs)
    return out + x / 3, more


def writes_before(inner, x, kwargs):
    x.mul_(2)
    return inner(hidden_states=x, **kwargs)


def writes_a_view_before(inner, x, kwargs):
    x[..., :7].neg_()
    return inner(hidden_states=x, **kwargs)


def writes_data_before(inner, x, kwargs):
    x.data[..., 3:].add_(1)
    return inner(hidden_states=x, **kwargs)


def writes_after(inner, x, kwargs):
    out, more = inner(hidden_states=x, **kwargs)
    return out + x.mul_(2), more


def doubles_x_after(inner, x, kwargs):
    y = inner(x)
    x.mul_(2)
    return y


def doubles_x_behind_its_version(inner, x, kwargs):
    y = inner(x)
    x.data.mul_(2)
    return y


def moves_x(inner, x, kwargs):
    y = inner(x)
    other = torch.zeros_like(x)
    x.data = other
    return y


def changes_the_weight(inner, x, kwargs):
    y = inner(x)
    inner.weight.data.neg_()
    inner.weight.data.neg_()
    return y


def keeps_the_product(inner, x, kwargs):
    return inner(x) * 2


def reads_a_product_twice(inner, x, kwargs):
    y = inner(x)
    return (x[..., :1] + y) * y.sigmoid()


def adds_in_place(inner, x, kwargs):
    r = x.cumsum(-1)
    r += inner(x)
    return r


def subtracts(inner, x, kwargs):
    return torch.add(x, inner(x), alpha=-1)


def adds_a_row(inner, x, kwargs):
    return inner(x) + x[:, :, :1]


def adds_itself(inner, x, kwargs):
    y = inner(x)
    return y + y


def adds_another_dtype(inner, x, kwargs):
    return (inner(x) + x.double()).float()


def adds_a_turned_one(inner, x, kwargs):
    return inner(x) + torch.stack([x, x], -1)[..., 1]


ATTENTION = [
    reads_before,
    reads_after,
    writes_before,
    writes_a_view_before,
    writes_data_before,
    writes_after,
]
OUT = [
    doubles_x_after,
    doubles_x_behind_its_version,
    moves_x,
    changes_the_weight,
    keeps_the_product,
    reads_a_product_twice,
    adds_in_place,
    subtracts,
    adds_a_row,
    adds_itself,
    adds_another_dtype,
    adds_a_turned_one,
]


def wrapped(act):
    """A model one of whose modules is wrapped: all of attention, or its last layer."""
    original = tiny()
    layer = original.model.layers[1]
    owner, name = (layer, "self_attn") if act in ATTENTION else (layer.self_attn, "o_proj")
    setattr(owner, name, Wrapped(getattr(owner, name), act).eval())
    return original


@pytest.mark.parametrize("act", [*ATTENTION, *OUT], ids=lambda act: act.__name__)
def test_whoever_reads_or_writes_what_was_left_out_has_the_models_own_values(twin, act):
    original = wrapped(act)
    model = flashnorm.capture_(flashnorm.accelerate_(copy.deepcopy(original)))
    cache, own = begun(model), begun(original)
    for token in range(4):
        found, said = reasons(lambda token=token: step(model, cache, token))
        assert not said
        assert close(found, step(original, own, token)), token
        assert same_caches(cache, own)
    assert twin.replays == 3


def test_what_is_read_at_once_needs_no_second_pass(twin):
    """The head's product is, by whoever takes the logits."""
    _, model = captured()
    cache = begun(model)
    step(model, cache), step(model, cache)
    assert twin.captures == 1


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


# What changes between steps.


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
    "data": lambda m: setattr(m.model.norm.weight, "data", m.model.norm.weight.data.flip(0).clone()),
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
    ("mode", "why"), [(overridden, "TorchFunctionMode"), (inference, "inference_mode")], ids=lambda v: str(v)
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


def test_training_is_the_models_own(twin):
    original, model = captured()
    said = run_steps(original, model, lambda m: m.model.layers[0].train())
    assert all(said)
    assert twin.captures == 1


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
    original = wrapped(act)
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

    original = wrapped(keeps)
    model = flashnorm.capture_(flashnorm.accelerate_(copy.deepcopy(original)))
    run_steps(original, model, lambda _: None)
    assert not twin.replays


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
    original, model = captured()
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
    with pytest.raises(flashnorm.FlashNormError, match="another one than its own"):
        model.forward = model.forward
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
