"""Tiny models with random gains, and a fold by hand of the Llama layout, built on the algebra."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from flashnorm.algebra import effective_gain, fold_gain_, identity_gain_
from flashnorm.plan import Gain, Span

LAYERS = 2
WIDTH = 64


def llama(**changes: Any) -> Any:
    """A Llama with two layers whose gains are 1 + 0.3·N(0, 1) and whose biases are random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(LlamaForCausalLM, LlamaConfig, **{"attention_bias": True, **changes})


def gemma() -> Any:
    """A Gemma 2, whose gains are stored as a difference from one."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return _random(Gemma2ForCausalLM, Gemma2Config, head_dim=16, query_pre_attn_scalar=16)


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return _random(BertModel, BertConfig)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return _random(
        T5ForConditionalGeneration, T5Config, d_model=WIDTH, d_kv=16, d_ff=96, num_heads=4
    )


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return _random(MixtralForCausalLM, MixtralConfig, num_local_experts=4)


def _random(model_class: Any, config_class: Any, **changes: Any) -> Any:
    config = config_class(
        **{
            "vocab_size": 199,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def readers(model: Any) -> list[tuple[nn.Module, tuple[nn.Linear, ...]]]:
    """(norm, the linears that read it) of a Llama, the final norm left out."""
    pairs: list[tuple[nn.Module, tuple[nn.Linear, ...]]] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs.append(
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        )
        pairs.append((layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)))
    return pairs


def folded(model: Any) -> Any:
    """A folded copy of a Llama: E1 on every norm but the final one."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for norm, linears in readers(result):
            gain = effective_gain(norm.weight, Gain("weight"))
            for linear in linears:
                fold_gain_(linear.weight, gain, 1, [Span(0, 0, gain.numel())])
            identity_gain_(norm.weight, Gain("weight"))
    return result
