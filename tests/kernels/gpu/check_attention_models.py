"""Models that attend by the GPU's kernel: in captures and compiled graphs, and nowhere else.

In the interpreter nothing is captured: what says that it is can be set.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    StaticCache,
)

import flashnorm
from flashnorm.integrations.transformers_attention import NAME, UsedAttention, use_attention_
from flashnorm.kernels import dispatch
from flashnorm.kernels.gpu import attention, policy
from flashnorm.kernels.gpu.backend import GPU, GpuAttention, GpuBackend
from tests.kernels.gpu.calls import DEVICE
from tests.runtime.models import LLAMA, QWEN3, SIZES, close, ids, tiny

GROUPED = {**SIZES, "num_key_value_heads": 2}
SLIDING = MistralConfig(**GROUPED, sliding_window=6)
MIXED = Gemma3TextConfig(
    **GROUPED,
    head_dim=16,
    sliding_window=5,
    layer_types=["sliding_attention", "full_attention"],
    final_logit_softcapping=None,
)
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "sliding": SLIDING, "mixed": MIXED}
CAPPED = Gemma2Config(**GROUPED, head_dim=16, attn_logit_softcapping=5.0, sliding_window=5)
SINKS = GptOssConfig(
    **GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=6
)
STEPS = 12


class Attention(GpuAttention):
    """What is said of a capture can be set; `calls` grows by the length of the keys of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.captured, self.calls = False, []

    def capturing(self):
        return self.captured


@dataclass(frozen=True, eq=False)
class Interpreted(GpuBackend):
    def claims(self, x):
        return x.device.type == DEVICE


@pytest.fixture
def kernel(monkeypatch):
    """The attention of a backend that has everything while the test runs."""
    found = Attention()
    made = Interpreted(**{**vars(GPU), "name": "interpreted", "device": DEVICE, "attention": found})
    attend = attention.attend

    def counted(q, k, v, scale, mask=None):
        found.calls.append(k.shape[2])
        return attend(q, k, v, scale, mask)

    monkeypatch.setattr(attention, "attend", counted)
    dispatch.register(made)
    yield found
    dispatch.unregister(made)
    torch._dynamo.reset()


def pair(config=LLAMA, dtype=torch.float32):
    """(the original, the same model that attends by the kernel)."""
    original = tiny(config, dtype).to(DEVICE)
    model = copy.deepcopy(original)
    assert not isinstance(use_attention_(model), str)
    return original, model


def cache_of(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=40)
    return None


def decoded(model, kind, prompt, tokens, mask=None, step=None):
    """Logits [B, tokens, vocab] of tokens one by one after a prompt, on a cache of this kind."""
    cache, found = cache_of(kind, model), []
    step = model if step is None else step
    with torch.no_grad():
        given = model(prompt, past_key_values=cache, attention_mask=mask, use_cache=True)
        cache = given.past_key_values
        for i in range(tokens.shape[1]):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            given = step(tokens[:, i : i + 1], past_key_values=cache, attention_mask=mask)
            found.append(given.logits.clone())
    return torch.cat(found, 1)


def inputs(batch=2, padded=False):
    prompt, tokens = ids(batch, 7).to(DEVICE), ids(batch, STEPS, seed=2).to(DEVICE)
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :3] = 0
    return prompt, tokens, mask if padded else None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_steps_attend_by_the_kernel(name, cache, padded, kernel):
    original, model = pair(CONFIGS[name])
    prompt, tokens, mask = inputs(padded=padded)
    expected = decoded(original, cache, prompt, tokens, mask)
    assert torch.equal(decoded(model, cache, prompt, tokens, mask), expected)
    assert kernel.calls  # to be loaded
    kernel.calls.clear()
    kernel.captured = True
    assert close(decoded(model, cache, prompt, tokens, mask), expected)
    assert len(kernel.calls) == 2 * STEPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, kernel):
    original, model = pair(dtype=dtype)
    prompt, tokens, _ = inputs()
    expected = decoded(original, "static", prompt, tokens)
    decoded(model, "static", prompt, tokens)
    kernel.captured = True
    assert close(decoded(model, "static", prompt, tokens), expected, dtype)
    assert len(kernel.calls) > 2 * STEPS


def test_called_one_by_one_it_runs_once_of_a_kind(kernel):
    """A growing cache is one kind, whatever its length; another batch is the same one."""
    original, model = pair()
    for batch in (1, 3):
        prompt, tokens, _ = inputs(batch)
        expected = decoded(original, "dynamic", prompt, tokens)
        assert torch.equal(decoded(model, "dynamic", prompt, tokens), expected)
    assert len(kernel.calls) <= 2  # the first length may be the only one of its alignment
    q, k, v = (torch.randn(1, 4, 1, 16, device=DEVICE) for _ in range(3))
    kernel.calls.clear()
    for _ in range(3):
        assert kernel.why_not(q, k, v) == policy.EAGER_ATTENTION
    assert kernel.calls == [1]


def test_a_kind_that_was_not_loaded_is_captured_without_the_kernel(kernel):
    original, model = pair()
    prompt, tokens, _ = inputs()
    kernel.captured = True
    expected = decoded(original, "static", prompt, tokens)
    assert torch.equal(decoded(model, "static", prompt, tokens), expected)
    assert not kernel.calls
    q = torch.randn(1, 4, 1, 16, device=DEVICE)
    assert kernel.why_not(q, q, q) == policy.NOT_LOADED


def test_what_the_kernel_does_not_take_is_never_loaded(kernel):
    q = torch.randn(1, 4, 1, 600, device=DEVICE)
    assert "600 features" in kernel.why_not(q, q, q)
    for mask in (torch.ones(1, device=DEVICE), torch.ones(4, 1, 1, device=DEVICE)):
        assert "the mask is" in kernel.why_not(q[..., :8], q[..., :8], q[..., :8], mask)
    assert not kernel.calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "sliding", "mixed"])
def test_compiled_graphs_call_the_operator(name, cache, kernel):
    original, model = pair(CONFIGS[name])
    prompt, tokens, _ = inputs()
    expected = decoded(original, cache, prompt, tokens)
    kernel.calls.clear()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = decoded(model, cache, prompt, tokens, step=step)
    assert close(found, expected)
    assert len(kernel.calls) == 2 * STEPS


def test_an_accelerated_model_says_that_it_attends_by_the_kernel(kernel):
    model = flashnorm.accelerate_(tiny().to(DEVICE))
    assert flashnorm.acceleration(model).attention == ""
    # On a GPU no cache is appended to in place.
    assert ("forward" in vars(model)) == (DEVICE == "cpu")
    assert model.config._attn_implementation == NAME
    flashnorm.restore_(model)
    assert model.config._attn_implementation == "sdpa"


def outcome(config, name):
    """Logits of a model that is told to use this implementation, or what sdpa says to it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().to(DEVICE)
    model.config._attn_implementation = name
    prompt, tokens, _ = inputs()
    try:
        return decoded(model, "dynamic", prompt, tokens)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("config", [CAPPED, SINKS], ids=["soft-capped", "sinks"])
def test_models_whose_attention_is_another_function_never_reach_the_kernel(config, kernel):
    """Even where somebody gives them our name: they get what sdpa makes of them."""
    UsedAttention()
    expected = outcome(config, "sdpa")
    for kernel.captured in (False, True):
        found = outcome(config, NAME)
        assert type(found) is type(expected)
        assert found == expected if isinstance(found, str) else torch.equal(found, expected)
    assert not kernel.calls


def test_a_soft_capped_model_without_caps_attends_by_the_kernel_and_is_right(kernel):
    plain = copy.deepcopy(CAPPED)
    plain.attn_logit_softcapping = None
    UsedAttention()
    expected = outcome(plain, "sdpa")
    for kernel.captured in (False, True):
        kernel.calls.clear()
        assert close(outcome(plain, NAME), expected)
    assert len(kernel.calls) == 2 * STEPS
