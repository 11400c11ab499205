"""Tiny random models of every causal-LM type, and the inputs they need."""

import math

import torch
from torch import nn

from tests.zoo.shrink import causal_lm_class, tiny_config

BATCH = 2
TOKENS = 7
SPREAD = 0.3


def causal_lm_types() -> list[str]:
    """All model types with a causal-LM class in the installed transformers, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return sorted(NAMES)


def tiny_model(model_type: str, seed: int = 0, config=None) -> nn.Module:
    """A tiny causal LM of `model_type` in eval mode and float32, with random weights, gains and biases."""
    torch.manual_seed(seed)
    config = tiny_config(model_type) if config is None else config
    cls = causal_lm_class(model_type)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = cls._from_config(config, **options)
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")
    model.eval()
    randomize_(model, seed)
    return model


def randomize_(model: nn.Module, seed: int) -> None:
    """Give every parameter values that hide nothing.

    Constant parameters (gains of one or zero, biases of zero) get `0.3 N(0, 1)` added. Weights of an
    embedding get a standard deviation of 1, other matrices `1 / sqrt(fan_in)`. What the model itself initialises with
    a pattern (decays, time steps) is one-dimensional or not constant, and stays.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            constant = bool((parameter == parameter.flatten()[0]).all())
            if parameter.ndim <= 2 and constant:
                parameter.add_(SPREAD * noise)
            elif parameter.ndim >= 2:
                std = 1.0 if id(parameter) in embeddings else 1 / math.sqrt(parameter[0].numel())
                parameter.copy_(std * noise)


def tiny_inputs(model: nn.Module, config=None) -> dict:
    """What a plain text forward of `model` needs: a batch of 2 rows of 7 tokens, without special tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 70, (BATCH, TOKENS), generator=generator)
    return {"input_ids": ids}
