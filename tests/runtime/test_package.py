"""A decode step from a package: the model's own tokens, and its own code wherever it does not fit.

All tests share one directory, so that what is compiled once is loaded by the others.
"""

from __future__ import annotations

import copy
from functools import wraps
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GemmaConfig, StaticCache
from transformers.cache_utils import DynamicLayer

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.runtime.package import make
from tests.errors import relative
from tests.runtime.models import LLAMA, QWEN3, SIZES, close, dyt, ids, logits
from tests.runtime.packages import LENGTH

pytestmark = pytest.mark.usefixtures("only_compiled")

SLOW = pytest.mark.slow  # each compiles a package more
GEMMA = GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=16)
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gemma": GEMMA, "dyt": dyt}
GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
FIXED = {"cache_implementation": "static", "max_cache_len": LENGTH}


def step(model, cache, token=7, **options):
    with torch.no_grad():
        tokens = torch.full((1, 1), token)
        return model(tokens, past_key_values=cache, use_cache=True, **options).logits


def prefill(model, tokens=None, cache=None):
    with torch.no_grad():
        tokens = ids() if tokens is None else tokens
        return model(tokens, past_key_values=cache, use_cache=True).past_key_values


def from_package(act):
    """What `act` returns, and why steps in it did not come from the package."""
    before = steps()
    found = act()
    return found, [reason for reason, n in steps().items() if n != before.get(reason)]


def steps():
    """How often a step did not come from the package, by reason."""
    return {k: n for k, n in dispatch.fallbacks().items() if k.startswith("decode step")}


MORE = [pytest.param(name, marks=SLOW) for name in ("gemma", "dyt")]


@pytest.mark.parametrize("config", ["llama", "qwen3", *MORE])
@pytest.mark.parametrize("options", [{}, FIXED], ids=["growing", "fixed"])
def test_greedy_tokens_are_the_same(pair, config, options):
    original, model = pair(CONFIGS[config])
    with dispatch.forbid_fallback():
        found = model.generate(ids(), **GREEDY, **options)
    assert torch.equal(found, original.generate(ids(), **GREEDY, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_every_step_of_a_loop_is_the_models_own(pair, dtype, fixed):
    original, model = pair(dtype=dtype)
    caches = [StaticCache(config=LLAMA, max_cache_len=LENGTH) if fixed else None for _ in "ab"]
    own, cache = prefill(original, cache=caches[0]), prefill(model, cache=caches[1])
    with dispatch.forbid_fallback():
        for token in range(1, 20):
            assert close(step(model, cache, token), step(original, own, token), dtype)
    for a, b in zip(cache.layers, own.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert close(a.keys, b.keys, dtype)
        assert close(a.values, b.values, dtype)
    assert int(cache.get_seq_length()) == int(own.get_seq_length()) == 24


def test_the_second_start_compiles_nothing(pair, monkeypatch):
    pair()

    def compiler(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(make, "trace", compiler)
    monkeypatch.setattr(make, "compile_", compiler)
    original, model = pair()
    with dispatch.forbid_fallback():
        assert torch.equal(model.generate(ids(), **GREEDY), original.generate(ids(), **GREEDY))
    monkeypatch.undo()
    assert "decode steps are compiled" in str(flashnorm.acceleration(model))


def test_weights_are_neither_copied_nor_kept(pair, directory):
    """The library has none in it, and reads a weight that was changed in place, or replaced."""
    original, model = pair()
    place = Path(flashnorm.acceleration(model).package)
    for m in (original, model):
        with torch.no_grad():
            m.model.layers[1].mlp.down_proj.weight.mul_(-3)
            m.model.norm.weight.data = m.model.norm.weight.data.flip(0).clone()
            m.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.ones(64, 64) / 9)
    with dispatch.forbid_fallback():
        assert torch.equal(model.generate(ids(), **GREEDY), original.generate(ids(), **GREEDY))
    weight = original.model.embed_tokens.weight.detach().numpy().tobytes()[:64]
    assert weight not in (place / "step.so").read_bytes()


CHANGES = {
    "a hook": lambda m: m.model.layers[1].mlp.register_forward_hook(lambda _, __, y: y * 0),
    "a hook before": lambda m: m.model.norm.register_forward_pre_hook(lambda _, x: (x[0] * 3,)),
    "a transposed weight": lambda m: setattr(
        m.model.layers[0].self_attn.q_proj.weight,
        "data",
        m.model.layers[0].self_attn.q_proj.weight.data.t(),
    ),
    "training": lambda m: m.model.layers[0].train(),
    "another eps": lambda m: setattr(m.model.norm, "variance_epsilon", 3.0),
    "another activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.Tanh()),
    "another module": lambda m: setattr(m.model.layers[1], "mlp", torch.nn.Identity()),
    "a bias": lambda m: setattr(
        m.model.layers[1].mlp.down_proj, "bias", torch.nn.Parameter(torch.ones(64))
    ),
    "another scale": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.9),
    "fewer layers": lambda m: m.model.layers.__delitem__(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_runs_its_own_code(pair, change):
    original, model = pair()
    cache, own = prefill(model), prefill(original)
    with dispatch.forbid_fallback():
        step(model, cache)
    step(original, own)
    CHANGES[change](model), CHANGES[change](original)
    found, reasons = from_package(lambda: step(model, cache))
    assert len(reasons) == 1, reasons
    assert close(found, step(original, own), found.dtype)


def test_another_dtype_runs_its_own_code(pair):
    original, model = pair()
    original.bfloat16(), model.bfloat16()
    found, reasons = from_package(lambda: step(model, prefill(model)))
    assert "dtype" in reasons[0]
    assert close(found, step(original, prefill(original)), torch.bfloat16)


def test_it_is_used_again_once_the_change_is_undone(pair):
    original, model = pair()
    handle = model.model.norm.register_forward_hook(lambda _, __, y: y * 2)
    _, reasons = from_package(lambda: step(model, prefill(model)))
    assert "hooks" in reasons[0]
    handle.remove()
    with dispatch.forbid_fallback():
        assert close(step(model, prefill(model)), step(original, prefill(original)))


def test_a_hook_on_the_model_itself_is_called(pair):
    _, model = pair()
    seen = []
    model.register_forward_hook(lambda _, __, out: seen.append(out.logits.shape))
    with dispatch.forbid_fallback():
        step(model, prefill(model))
    assert seen == [(1, 5, 256), (1, 1, 256)]


def test_adapters_over_linear_layers(pair):
    peft = pytest.importorskip("peft")
    original, model = pair()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    own = peft.get_peft_model(original, config).eval()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    found, reasons = from_package(lambda: adapted.generate(input_ids=ids(), **GREEDY))
    assert reasons
    assert torch.equal(found, own.generate(input_ids=ids(), **GREEDY))


def test_longer_than_the_package_runs_its_own_code(pair):
    original, model = pair()
    long = {**GREEDY, "max_new_tokens": 48, "min_new_tokens": 48}
    found, reasons = from_package(lambda: model.generate(ids(), **long))
    assert "full" in reasons[0]
    assert torch.equal(found, original.generate(ids(), **long))


def test_a_token_that_there_is_not_is_an_error(pair):
    original, model = pair()
    for m, error in ((original, IndexError), (model, RuntimeError)):
        cache = prefill(m)
        with pytest.raises(error):
            step(m, cache, token=256)
        assert cache.get_seq_length() == 5


def test_a_full_fixed_cache_is_an_error_of_its_own(pair):
    original, model = pair()
    for m in (original, model):
        cache = prefill(m, ids(1, LENGTH), StaticCache(config=LLAMA, max_cache_len=LENGTH))
        with pytest.raises(IndexError):
            step(m, cache)


@pytest.mark.parametrize("config", ["llama", pytest.param("qwen3", marks=SLOW)])
@pytest.mark.parametrize("options", [{}, FIXED], ids=["growing", "fixed"])
def test_a_padded_batch(pair, config, options):
    original, model = pair(CONFIGS[config], batch=2)
    tokens = ids(2, 6)
    mask = torch.ones_like(tokens)
    tokens[0, :3], mask[0, :3] = 0, 0
    expected = original.generate(tokens, attention_mask=mask, **GREEDY, **options)
    with dispatch.forbid_fallback():
        found = model.generate(tokens, attention_mask=mask, **GREEDY, **options)
    assert torch.equal(found, expected)


def test_another_batch_runs_its_own_code(pair):
    original, model = pair()
    found, reasons = from_package(lambda: model.generate(ids(3), **GREEDY))
    assert "batch" in reasons[0]
    assert torch.equal(found, original.generate(ids(3), **GREEDY))


def test_beams_are_the_same(pair):
    original, model = pair(batch=2)
    expected = original.generate(ids(), num_beams=2, **GREEDY)
    assert torch.equal(model.generate(ids(), num_beams=2, **GREEDY), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"labels": torch.tensor([[3]])},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])},  # longer than the cache
        {"attention_mask": torch.zeros(1, 1, 1, 7)},  # added to the scores
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_arguments_run_their_own_code(pair, options):
    original, model = pair()
    cache, own = prefill(model), prefill(original)
    step(model, cache), step(original, own)
    if "output_attentions" in options:  # attention that returns weights is another one
        model.set_attn_implementation("eager"), original.set_attn_implementation("eager")

    def act(m, c):
        with torch.no_grad():
            out = m(torch.tensor([[7]]), past_key_values=c, use_cache=True, **options)
        return out[0] if isinstance(out, tuple) else out

    found, reasons = from_package(lambda: act(model, cache))
    expected = act(original, own)
    assert len(reasons) == 1
    if isinstance(found, torch.Tensor):
        assert close(found, expected)
    else:
        assert found.keys() == expected.keys()
        assert close(found.logits, expected.logits)


def test_positions_and_masks_are_followed(pair):
    original, model = pair()
    options = {
        "position_ids": torch.tensor([[17]]),
        "attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1]]),
    }
    plain = step(original, prefill(original))
    with dispatch.forbid_fallback():
        found = step(model, prefill(model), **options)
    expected = step(original, prefill(original), **options)
    assert close(found, expected)
    assert relative(plain, expected) > 1e-2  # else the test would say nothing


def test_a_view_that_somebody_keeps_does_not_change(pair):
    original, model = pair()
    found = []
    for m in (original, model):
        cache = prefill(m)
        step(m, cache, 3), step(m, cache, 4)
        kept = cache.layers[0].keys
        before = kept.clone()
        cache.crop(-2)
        step(m, cache, 9)
        assert torch.equal(kept, before)
        found.append(step(m, cache, 8))
    assert close(found[1], found[0])


def test_copies_of_a_cache_go_their_own_ways(pair):
    original, model = pair()
    found = []
    for m in (original, model):
        cache = prefill(m)
        step(m, cache, 3)
        twin = copy.deepcopy(cache)
        shared = DynamicCache(config=LLAMA)
        for mine, theirs in zip(twin.layers, cache.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)
        for index, layer in enumerate(cache.layers):  # the very tensors in another cache
            shared.update(layer.keys[:, :, :0], layer.values[:, :, :0], index)
            shared.layers[index].keys, shared.layers[index].values = layer.keys, layer.values
        rows = [step(m, c, t) for t, c in ((5, cache), (6, twin), (7, shared), (8, cache))]
        found.append(torch.cat([*rows, step(m, twin, 9), step(m, shared, 10)]))
    assert close(found[1], found[0])


def test_data_that_is_swapped_is_read(pair):
    """`keys.data = other` leaves the object as it was."""
    original, model = pair()
    found = []
    for m in (original, model):
        cache = prefill(m)
        step(m, cache, 3)
        cache.layers[1].keys.data = cache.layers[1].keys.clone() * 3
        found.append(step(m, cache, 4))
    assert close(found[1], found[0])


@pytest.mark.parametrize("of_class", [False, True])
def test_a_cache_whose_code_was_replaced_runs_it(pair, monkeypatch, of_class):
    original, model = pair()
    update, found = DynamicLayer.update, []

    @wraps(update)
    def doubled(self, key_states, value_states, *args, **kwargs):
        return update(self, 2 * key_states, value_states)

    caches = [prefill(m) for m in (original, model)]
    if of_class:
        monkeypatch.setattr(DynamicLayer, "update", doubled)
    for m, cache in zip((original, model), caches, strict=True):
        if not of_class:
            cache.layers[1].update = doubled.__get__(cache.layers[1])
        found.append(step(m, cache, 4))
    assert close(found[1], found[0])


def test_a_gradient_is_the_models_own(pair):
    original, model = pair()
    found = []
    for m in (original, model):
        out = m(torch.tensor([[7]]), past_key_values=prefill(m), use_cache=True)
        out.logits.square().sum().backward()
        found.append(m.model.layers[0].mlp.up_proj.weight.grad)
    assert close(found[1], found[0])


def test_autocast_is_followed(pair):
    original, model = pair()
    with torch.autocast("cpu", torch.bfloat16):
        found, reasons = from_package(lambda: step(model, prefill(model)))
        assert len(reasons) == 1
        assert close(found, step(original, prefill(original)), torch.bfloat16)


def test_restoring_takes_it_away(pair):
    original, model = pair()
    forward = model.forward
    flashnorm.restore_(model)
    assert "forward" not in vars(model)
    cache, own = prefill(model), prefill(original)
    assert torch.equal(step(model, cache), step(original, own))
    assert torch.equal(logits(model, ids()), logits(original, ids()))
    assert torch.equal(forward(ids()).logits, original(ids()).logits)  # of who still holds it


def test_a_copy_and_the_original_code_run_without_it(pair):
    original, model = pair()
    twin = copy.deepcopy(model)
    assert close(step(twin, prefill(twin)), step(original, prefill(original)))
    with flashnorm.original(model):
        assert torch.equal(step(model, prefill(model)), step(original, prefill(original)))
    with dispatch.forbid_fallback():
        step(model, prefill(model))
