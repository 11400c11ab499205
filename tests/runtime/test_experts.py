"""Experts in one tensor: few tokens read the chosen ones on kernels, and all else is as before."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

import flashnorm
from flashnorm.integrations import transformers_experts as experts
from flashnorm.kernels import dispatch
from flashnorm.kernels.cpu import backend as cpu
from tests.errors import relative
from tests.runtime.models import LLAMA, SIZES, close, ids, logits, tiny
from tests.toys import numpy_backend

HEADS = {**SIZES, "num_key_value_heads": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "first_k_dense_replace": 1,
}
ROUTED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 48}
CONFIGS = {
    "mixtral": MixtralConfig(**HEADS, num_local_experts=6, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **HEADS, head_dim=16, num_experts=12, num_experts_per_tok=9, moe_intermediate_size=48
    ),
    "olmoe": OlmoeConfig(**HEADS, num_experts=8, num_experts_per_tok=3),
    "gpt_oss": GptOssConfig(**HEADS, head_dim=16, num_local_experts=6, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(**SIZES, **LATENT, **ROUTED, num_experts_per_tok=2),
}
MIXTRAL = CONFIGS["mixtral"]


def pair(config=MIXTRAL, dtype=torch.float32):
    """(the original, the same model accelerated)."""
    original = tiny(config, dtype)
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.ndim != 2 and parameter.ndim != 1:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return original, flashnorm.accelerate_(copy.deepcopy(original))


def wide(original):
    """In float64, which grouped_mm does not take: by the model's own code."""
    twin = copy.deepcopy(original).double()
    twin.set_experts_implementation("eager")
    return twin


@pytest.fixture
def calls(backend, monkeypatch):
    """Grows by the groups of every call."""
    made = []
    kind = cpu.Experts if backend is cpu.CPU else numpy_backend.Experts
    multiply = kind.multiply

    def counted(self, x, weight, bias, groups):
        made.append(list(groups))
        return multiply(self, x, weight, bias, groups)

    monkeypatch.setattr(kind, "multiply", counted)
    return made


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (2, 40)], ids=str)
def test_the_outputs_are_those_of_the_original(name, shape, calls):
    original, model = pair(CONFIGS[name])
    tokens = ids(*shape)
    # Its norms are given parts of a tensor, which no kernel takes.
    with nullcontext() if name == "deepseek_v3" else dispatch.forbid_fallback():
        found = logits(model, tokens)
    assert close(found, logits(wide(original), tokens))
    layers = 1 if name == "deepseek_v3" else 2
    assert len(calls) == (2 * layers if tokens.numel() <= 16 else 0)
    chosen = tokens.numel() * original.config.num_experts_per_tok
    assert all(sum(rows for _, rows in groups) == chosen for groups in calls)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_same(name, calls):
    original, model = pair(CONFIGS[name])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found = model.generate(ids(), **options)
    assert torch.equal(found, original.generate(ids(), **options))
    assert len(calls) >= (12 if name == "deepseek_v3" else 24) * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_half_precision_is_no_farther_from_the_truth(name, dtype):
    """Of the experts alone: the router chooses by itself, and chooses the same."""
    original, model = pair(CONFIGS[name], dtype)
    module = next(m for m in model.modules() if experts.has_experts(m))
    theirs, twin = (
        next(m for m in each.modules() if experts.has_experts(m))
        for each in (original, wide(original))
    )
    torch.manual_seed(0)
    x, r = torch.randn(16, 64).to(dtype), torch.rand(16, 3).to(dtype)
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(16)])
    with torch.no_grad(), dispatch.forbid_fallback():
        truth = twin(x.double(), chosen, r.double())
        ours, own = module(x, chosen, r), theirs(x, chosen, r)
    assert ours.dtype == own.dtype == dtype
    assert relative(ours.double(), truth) < 1.1 * relative(own.double(), truth)


def test_restore_gives_the_original_back():
    original, model = pair()
    before = copy.deepcopy(original.config.to_dict())
    state = original.state_dict()
    assert model.config._experts_implementation == "grouped_mm_decode_cpu"
    assert "experts of few tokens run on a kernel" in str(flashnorm.acceleration(model))
    assert flashnorm.acceleration(model).experts == ""
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with flashnorm.original(model):
        assert torch.equal(logits(model, ids()), logits(original, ids()))
    assert model.config._experts_implementation == "grouped_mm_decode_cpu"
    flashnorm.restore_(model)
    assert model.config._experts_implementation == "grouped_mm"
    assert model.config.to_dict() == before
    assert torch.equal(logits(model, ids()), logits(original, ids()))


def test_no_file_keeps_the_name(tmp_path):
    _, model = pair()
    model.save_pretrained(tmp_path)
    assert "decode_cpu" not in (tmp_path / "config.json").read_text()


def test_a_copy_and_a_pickled_model_run_on_kernels(calls):
    original, model = pair()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert close(logits(other, ids()), logits(original, ids()))
        assert len(calls) == 4


def test_weights_may_move_and_change(calls):
    original, model = pair()
    logits(model, ids())
    for changed in (original, model):
        for module in changed.modules():
            if experts.has_experts(module):
                module.down_proj.data = module.down_proj.data.flip(0).clone()
                with torch.no_grad():
                    module.gate_up_proj.mul_(1.5)
    calls.clear()
    assert close(logits(model, ids()), logits(original, ids()))
    assert len(calls) == 4
    calls.clear()
    half = torch.bfloat16
    assert close(logits(model.to(half), ids()), logits(wide(original.to(half)), ids()), half)
    assert len(calls) == 4


def test_a_gradient_is_that_of_the_original(calls):
    original, model = pair()
    for each in (original, model):
        each(ids(), use_cache=False).logits.square().sum().backward()
    assert not calls
    assert dispatch.fallbacks()[dispatch.GRADIENT]
    for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or relative(p.grad, q.grad) < 1e-4, name


def test_hooks_see_what_they_saw():
    original, model = pair()
    seen = []
    for each in (original, model):
        module = next(m for m in each.modules() if experts.has_experts(m))
        module.register_forward_hook(lambda _m, _x, y: seen.append(y) or y * 2)
        module.act_fn.register_forward_hook(lambda _m, _x, y: y + 0.5)
    assert close(logits(model, ids()), logits(original, ids()))
    assert close(*seen)


def test_what_does_not_fit_runs_as_before(calls):
    _, model = pair()
    module = next(m for m in model.modules() if experts.has_experts(m))
    x, chosen, r = torch.randn(2, 64), torch.tensor([[0, 5], [3, 3]]), torch.rand(2, 2)
    with torch.no_grad():
        expected = module(x, chosen, r)
        assert len(calls) == 2
        assert close(module(x, top_k_index=chosen, top_k_weights=r), expected)
        with torch.autocast("cpu", torch.bfloat16):
            module(x, chosen, r)
        with dispatch.forbid_fallback(), pytest.raises(flashnorm.FlashNormError, match="chosen"):
            module(x, torch.tensor([[0, 6], [1, 2]]), r)
        with (
            dispatch.forbid_fallback(),
            pytest.raises(flashnorm.FlashNormError, match="do not fit"),
        ):
            module(x, chosen[:1], r)
        module._apply_gate = lambda y: y[:, :5]
        with dispatch.forbid_fallback(), pytest.raises(flashnorm.FlashNormError, match="gate"):
            module(x, chosen, r)


def test_a_compiled_graph_has_the_products_of_before(calls):
    original, model = pair()
    compiled = torch.compile(model, backend="eager")
    assert close(logits(compiled, ids()), logits(original, ids()))
    assert not calls


@pytest.mark.parametrize("name", ["eager", "batched_mm"])
def test_what_the_model_had_before_is_kept(name):
    original = tiny(MIXTRAL)
    original.set_experts_implementation(name)
    model = flashnorm.accelerate_(copy.deepcopy(original))
    reason = flashnorm.acceleration(model).experts
    if name == "eager":
        assert "asks for 'eager' experts, not for grouped_mm or batched_mm" in reason
        assert reason in str(flashnorm.acceleration(model))
        assert model.config._experts_implementation == "eager"
    else:
        assert model.config._experts_implementation == "batched_mm_decode_cpu"
    assert close(logits(model, ids()), logits(original, ids()))
    flashnorm.restore_(model)
    assert model.config._experts_implementation == name


def test_an_implementation_that_was_given_meanwhile_stays():
    _, model = pair()
    model.set_experts_implementation("eager")
    flashnorm.restore_(model)
    assert model.config._experts_implementation == "eager"


def test_experts_in_another_dtype_are_refused():
    model = flashnorm.accelerate_(tiny(MIXTRAL).double())
    assert "its experts are torch.float64" in flashnorm.acceleration(model).experts


def test_a_model_without_experts_says_nothing_of_them():
    model = flashnorm.accelerate_(tiny(LLAMA))
    assert flashnorm.acceleration(model).experts is None
    assert "experts" not in str(flashnorm.acceleration(model))
