"""A language model with packed weights: decoding on a cache, generate(), and verify."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.quantized import layout
from flashnorm.verification.bounds import Size, output_bound
from flashnorm.verification.precision import float64_truth, in_dtype
from tests.errors import relative
from tests.quantized.models import ORIGINS, dequantized

HIDDEN, LAYERS, TOKENS = 64, 2, 12
PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 60]])
CHOSEN = ["torchao int8", "torchao intx", "bitsandbytes nf4 nested", "gptq"]
COMPRESSED = "compressed-tensors int4 zeros"


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        else:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval().requires_grad_(False)


def written(model: nn.Module) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)[0].tolist()


@torch.no_grad()
def decoded_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[1, T, vocabulary] of a prompt, and of one token after the other on its cache."""
    out = model(ids[:, : PROMPT.shape[1]], use_cache=True)
    found = [out.logits]
    for t in range(PROMPT.shape[1], ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("origin", [*CHOSEN, COMPRESSED])
def test_generate_writes_what_the_dequantized_model_writes(decoded, origin):
    model = ORIGINS[origin](llama())
    dense = dequantized(model)
    flashnorm.accelerate_(model)
    assert {part.reason for part in flashnorm.acceleration(model).parts} == {""}
    decoded.ran.clear()
    text = written(model)
    assert text == written(dense)
    # q, k and v; o; gate and up; down; and the head, for each of the tokens.
    assert sum(decoded.ran.values()) == TOKENS * (LAYERS * 4 + 1)
    assert dispatch.fallbacks() == {}
    ids = torch.tensor([text])
    truth = decoded_logits(dense, ids)
    bound = output_bound(Size(2 * HIDDEN, 7 * LAYERS + 1, torch.float32), torch.float32)
    assert relative(decoded_logits(model, ids).double(), truth) <= bound


def test_a_head_tied_to_a_table_stays_dense_beside_packed_layers(decoded):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama(tied=True)
    quantize_(
        model,
        Int8WeightOnlyConfig(version=2),
        filter_fn=lambda m, path: isinstance(m, nn.Linear) and "head" not in path,
    )
    own = written(copy.deepcopy(model))
    flashnorm.accelerate_(model)
    assert {part.reason for part in flashnorm.acceleration(model).parts} == {""}
    assert written(model) == own
    assert dispatch.fallbacks() == {}


@pytest.mark.parametrize(
    ("origin", "dtype"),
    [
        ("torchao int8", torch.float32),
        ("torchao intx", torch.bfloat16),
        ("bitsandbytes nf4", torch.bfloat16),
        ("gptq", torch.float16),
        (COMPRESSED, torch.bfloat16),
    ],
    ids=str,
)
def test_verify_holds_both_against_the_dequantized_model(decoded, origin, dtype):
    model = ORIGINS[origin](llama(dtype))
    hooks, twin = dict(model._forward_pre_hooks), copy.deepcopy(model)
    flashnorm.accelerate_(twin)
    report = flashnorm.verify(model, twin, tokens=64, sample=32)
    assert report.ok
    assert any("quantized layers is that of their dequantized weights" in n for n in report.notes)
    assert report.float64.max <= report.float64_bound
    assert report.half.reference.rms > 0
    assert dict(model._forward_pre_hooks) == hooks
    for layer in (m.model.layers[1].mlp.down_proj for m in (model, twin)):
        assert isinstance(layout.find(layer), layout.Held)  # as it was, in the memory it was in
    values = layout.find(layer).tensors(layer)[0]
    with torch.no_grad():
        values.copy_(values.flip(0))
    assert not flashnorm.verify(model, twin, tokens=64, sample=32).ok


@pytest.mark.parametrize("origin", ["bitsandbytes nf4", "torchao float8", COMPRESSED])
def test_the_truth_is_that_of_the_dequantized_weights(origin):
    model = ORIGINS[origin](llama())
    dense = dequantized(model)
    with torch.no_grad(), in_dtype(model, torch.float64), float64_truth():
        found = model(PROMPT).logits
    bound = output_bound(Size(2 * HIDDEN, 7 * LAYERS + 1, torch.float64), torch.float64)
    # Norms and rotary frequencies of a model compute in float32 without it.
    with torch.no_grad(), float64_truth():
        truth = dense(PROMPT).logits
    assert relative(found, truth) <= bound
