"""Models that attend by the kernel where they generate, and by sdpa everywhere else."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from transformers import MistralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flashnorm.integrations import transformers_attention as attention
from flashnorm.integrations.transformers_attention import NAME, restore_attention_, use_attention_
from flashnorm.verification.bounds import HALF_RATIO
from tests.runtime.models import LLAMA, NEOX, QWEN3, SIZES, close, ids, logits, tiny
from tests.runtime.recorded import attended

SLIDING = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6)
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gpt_neox": NEOX, "sliding": SLIDING}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


def pair(config=LLAMA, dtype=torch.float32):
    """(the original, the same model that attends by the kernel)."""
    original, model = tiny(config, dtype), alone(config, dtype)
    assert not isinstance(use_attention_(model), str)
    return original, model


def alone(config=LLAMA, dtype=torch.float32):
    """A model that shares its config with no other."""
    return copy.deepcopy(tiny(config, dtype))


@pytest.fixture
def calls(backend, monkeypatch):
    """Grows by the length of the keys of every call of the kernel."""
    return attended(backend, monkeypatch)


def generate(model, tokens, **options):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **options}
    return model.generate(tokens, **options)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_same(name, cache, calls):
    original, model = pair(CONFIGS[name])
    found = generate(model, ids(), **CACHES[cache])
    assert torch.equal(found, generate(original, ids(), **CACHES[cache]))
    assert len(calls) == 2 * 11  # each layer, for all tokens but the first new one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_farther_from_the_truth(dtype):
    """Beyond chance: a sequence is one draw of roundings; two standard errors are allowed."""
    tokens = ids(64, 24)
    truth = logits(tiny(dtype=dtype).double(), tokens)[:, -1]
    squares = []
    for model in pair(dtype=dtype):
        with torch.no_grad():
            cache = model(tokens[:, :-1], use_cache=True).past_key_values
            last = model(tokens[:, -1:], past_key_values=cache).logits[:, -1]
        squares.append((last.double() - truth).square().sum(-1))
    excess = squares[1] - HALF_RATIO**2 * squares[0]
    assert excess.mean() <= 2 * excess.std() / len(excess) ** 0.5


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_batch_is_the_same(name, cache, calls):
    original, model = pair(CONFIGS[name])
    tokens = ids(3, 6)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 2, 4)):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    options = {"attention_mask": mask, **CACHES[cache]}
    assert torch.equal(generate(model, tokens, **options), generate(original, tokens, **options))
    assert calls


def test_beams_are_the_same(calls):
    original, model = pair()
    found = generate(model, ids(2), num_beams=3)
    assert torch.equal(found, generate(original, ids(2), num_beams=3))
    assert calls


@pytest.mark.parametrize("name", CONFIGS)
def test_many_tokens_are_the_same_bits(name, calls):
    original, model = pair(CONFIGS[name])
    assert torch.equal(logits(model, ids(2, 9)), logits(original, ids(2, 9)))
    assert not calls


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_is_close(name, calls):
    original, model = pair(CONFIGS[name])
    assert close(logits(model, ids(2, 1)), logits(original, ids(2, 1)))
    assert calls


def test_a_mask_of_numbers_is_the_same(calls):
    original, model = pair()
    mask = torch.zeros(2, 1, 1, 1)
    options = {"attention_mask": mask}
    assert close(logits(model, ids(2, 1), **options), logits(original, ids(2, 1), **options))
    assert calls == [1, 1]


def test_attentions_are_asked_for_as_from_sdpa():
    found = []
    for model in pair():
        output = model(ids(1, 1), output_attentions=True)
        found.append((output.attentions, output.logits))
        with pytest.raises(ValueError, match="not supported when using"):
            model.config.output_attentions = True
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_gradients_and_training_are_those_of_sdpa(calls):
    found = []
    for model in pair():
        tokens = ids(2, 1)
        model(tokens).logits.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
        with torch.no_grad():
            found.append([model.train()(tokens).logits])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert torch.equal(found[1][0], found[3][0])
    assert not calls


def test_compiled_as_one_graph(calls):
    original, model = pair()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (1, 5):
        assert torch.equal(logits(compiled, ids(1, length)), logits(original, ids(1, length)))
    assert not calls


def test_under_a_mode_or_a_transform_torch_sees_its_own_operations(calls):
    from torch.utils.flop_counter import FlopCounterMode

    original, model = pair()
    counted = []
    for m in (original, model):
        with FlopCounterMode(display=False) as counter:
            logits(m, ids(1, 1))
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model, ids(1, 1)), logits(original, ids(1, 1)))
    assert not calls


MODULE = nn.Module().eval()
GROUPED = nn.Module().eval()
GROUPED.num_key_value_groups = 2


def direct(module=GROUPED, heads=4, **options):
    """(what the interface gives, what sdpa does) for one token of 4 heads, or what they raise."""
    q, k, v = torch.randn(2, heads, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    found = []
    for name in (NAME, "sdpa"):
        try:
            found.append(ALL_ATTENTION_FUNCTIONS[name](module, q, k, v, None, **options))
        except (ValueError, RuntimeError) as error:
            found.append((type(error), str(error)))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 30.0},
        {"position_bias": torch.randn(1, 4, 1, 5)},
        {"s_aux": torch.randn(4)},
        {"unheard_of": 3},
        {"output_attentions": True},
        {"module": MODULE},  # four heads for two, and nobody says so
        {"heads": 2},  # groups where there are none
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_known_is_left_to_sdpa(options, calls):
    pair()
    found, expected = direct(**options)
    assert found[0] is expected[0] or torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert not calls


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("module", [GROUPED, MODULE], ids=["grouped", "plain"])
def test_what_says_nothing_about_one_token_is_the_same(module, scaling, calls):
    pair()
    options = {"position_ids": torch.zeros(2, 1), "sliding_window": 3, "use_cache": True}
    heads = 4 if module is GROUPED else 2
    found, expected = direct(module, heads, scaling=scaling, is_causal=True, **options)
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert found[0].is_contiguous()
    assert found[1] is None
    assert calls == [5]


def test_restore_gives_the_name_back():
    model = alone()
    used = use_attention_(model)
    assert model.config._attn_implementation == NAME
    restore_attention_(model, used)
    assert model.config._attn_implementation == "sdpa"
    used = use_attention_(model)
    model.set_attn_implementation("eager")
    restore_attention_(model, used)
    assert model.config._attn_implementation == "eager"


def test_transformers_takes_the_name_for_sdpa_like():
    """A name with "flash" in it would get the masks of flash attention."""
    from transformers.utils.generic import is_flash_attention_requested

    assert not is_flash_attention_requested(requested_attention_implementation=NAME)
    assert "sdpa" in NAME
    assert not any(other in NAME for other in ("flex", "eager", "paged", "/"))


def test_a_saved_config_is_that_of_the_original(tmp_path):
    original, model = pair()
    assert model.config.to_dict() == original.config.to_dict()
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text("utf-8")
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded, ids()), logits(original, ids()))


def test_a_copy_attends_by_the_kernel_and_is_restored_by_itself(calls):
    _, model = pair()
    other = copy.deepcopy(model)
    restore_attention_(model, attention.UsedAttention())
    logits(model, ids(1, 1))
    assert not calls
    logits(other, ids(1, 1))
    assert calls


def test_models_that_share_a_config_share_its_attention(calls):
    model = alone()
    other = type(model)(model.config).eval()
    used = [use_attention_(m) for m in (model, other)]
    assert not any(isinstance(u, str) for u in used)
    logits(other, ids(1, 1))
    assert calls
    for m, u in zip((model, other), used, strict=True):
        restore_attention_(m, u)
        assert m.config._attn_implementation == "sdpa"


def test_unpickled_elsewhere_the_name_is_known():
    used = use_attention_(alone())
    data = pickle.dumps(used)
    del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME]
    pickle.loads(data)
    assert ALL_ATTENTION_FUNCTIONS[NAME] is attention.attention
    assert isinstance(copy.deepcopy(used), attention.UsedAttention)


def test_a_model_that_asks_for_something_else_keeps_it():
    model = alone()
    model.set_attn_implementation("eager")
    assert "runs on 'eager' attention, not on 'sdpa'" in use_attention_(model)
    assert model.config._attn_implementation == "eager"
    assert use_attention_(nn.Linear(2, 2)) == "the model is not one from transformers"


def test_a_model_that_knows_sdpa_by_name_keeps_it(monkeypatch):
    """Falcon's attention asks whether it is called "sdpa"; a default of an argument does not."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"})
    model = FalconForCausalLM(config)
    found = use_attention_(model)
    assert isinstance(found, str)
    assert model.config._attn_implementation == "sdpa"
    import transformers.models.falcon.modeling_falcon as falcon

    assert attention._distinguishes(falcon.__name__)
    assert not attention._distinguishes(type(tiny()).__module__)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x, y='sdpa'): return x", False),
        ("def f(x, *, y='sdpa'): return x", False),
        ("'''about sdpa'''\nx = 'eager'", False),
        ("def f(c): return c._attn_implementation == 'sdpa'", True),
        ("KINDS = {'sdpa': 1}", True),
        ("def f(y='sdpa'): return y in ('eager', 'sdpa')", True),
    ],
)
def test_code_that_knows_sdpa_by_name_is_seen(code, expected, tmp_path, monkeypatch):
    name = f"knows_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__(name)
    assert attention._distinguishes(name) is expected
    del sys.modules[name]
    assert attention._distinguishes("a_module_that_is_not_there")
