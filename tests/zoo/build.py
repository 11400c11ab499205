"""Tiny random models of every causal-LM type, and the inputs they need."""

import inspect
import math

import torch
from torch import nn

from .shrink import FIRST_SPECIAL, causal_lm_class, tiny_config
from .variants import VARIANTS

BATCH = 2
TOKENS = 7
ENCODED = 5  # positions of an encoder's output that cross-attention reads
SPREAD = 0.3
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def causal_lm_types() -> list[str]:
    """All model types with a causal-LM class in the installed transformers, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return sorted(NAMES)


def tiny_model(name: str, seed: int = 0, config=None) -> nn.Module:
    """A tiny causal LM of a model type or variant, random, in eval mode and float32."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    config = tiny_config(model_type, **changes) if config is None else config
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = causal_lm_class(model_type)._from_config(config, **options).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    randomize_(model, seed)
    return model


def randomize_(model: nn.Module, seed: int) -> None:
    """Give every parameter values that hide no error.

    Weights become N(0, 1/fan_in), embeddings N(0, 1). Any other parameter that is constant (gains
    of one or zero, biases of zero) gets 0.3 N(0, 1) added. What a model initialises with a pattern
    (decays, time steps, sinusoids) stays.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = _weights_of(model, nn.Embedding)
    weights = _weights_of(model, WEIGHTED)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if not parameter.requires_grad and not _is_constant(parameter):
                continue  # sinusoids
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif id(parameter) in weights:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            elif _is_constant(parameter):
                parameter.add_(SPREAD * noise)
            elif parameter.ndim >= 2 and not _is_pattern(parameter):
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point() and _is_constant(buffer):
                buffer.add_(SPREAD * torch.randn(buffer.shape, generator=generator))


def _weights_of(model: nn.Module, kinds) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, kinds)}


def variants() -> list[str]:
    """Names of the variants: options, off by default, that change what a norm does."""
    return sorted(VARIANTS)


def _is_constant(parameter: torch.Tensor) -> bool:
    return bool((parameter == parameter.flatten()[:1]).all())


def _is_pattern(parameter: torch.Tensor) -> bool:
    """All rows, or all columns, are equal."""
    rows, columns = parameter == parameter[:1], parameter == parameter[..., :1]
    return bool(rows.all() or columns.all())


def tiny_inputs(model: nn.Module, config=None) -> dict:
    """What a text forward of `model` needs, so that its cross-attention runs too.

    The text is 2 rows of 7 tokens, none of them special; an encoder's output is random.
    """
    config = model.config if config is None else config
    text = config.get_text_config()
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    rows = BATCH * _codebooks(model)
    # No token twice in a row: equal tokens tie in a top-k, and rounding alone would decide.
    order = [torch.randperm(FIRST_SPECIAL - 10, generator=generator) for _ in range(rows)]
    ids = 10 + torch.stack([permutation[:TOKENS] for permutation in order])
    if "shared_kv_states" in accepted:
        return _drafter_inputs(config, text, random)
    inputs = {"input_ids": ids}
    if width := _encoder_width(model):
        names = ("encoder_hidden_states", "cross_attention_states", "encoder_outputs")
        name = next(name for name in names if name in accepted)
        encoded = random(BATCH, ENCODED, width)
        inputs[name] = (encoded,) if name == "encoder_outputs" else encoded
    if not hasattr(config, "num_hidden_layers") and not hasattr(text, "num_hidden_layers"):
        inputs["use_cache"] = False  # the library cannot lay out a cache without a layer count
    return inputs


def _codebooks(model: nn.Module) -> int:
    """How many rows of ids make one sequence: one per token embedding."""
    embeddings = model.get_input_embeddings()
    return len(embeddings) if isinstance(embeddings, nn.ModuleList) else 1


def _encoder_width(model: nn.Module) -> int | None:
    """The input width of the keys of cross-attention, if the model has any."""
    for name, module in model.named_modules():
        *parents, last = name.split(".")
        crosses = any("encoder_attn" in part or "cross" in part for part in parents)
        if crosses and last in ("k_proj", "key", "key_proj"):
            return module.in_features
        if crosses and last == "c_attn":  # Conv1D: [in, out]
            return module.weight.shape[0]
    return None


def _drafter_inputs(config, text, random) -> dict:
    """A drafter reads the target's hidden states, token embeddings, keys and values."""
    states = {}
    for kind, layer in zip(text.layer_types, text.per_layer_config, strict=True):
        shape = (BATCH, layer.num_key_value_heads, TOKENS, layer.head_dim)
        states[kind] = (random(*shape), random(*shape))
    return {
        "inputs_embeds": random(BATCH, TOKENS, 2 * config.backbone_hidden_size),
        "position_ids": torch.arange(TOKENS).expand(BATCH, -1),
        "shared_kv_states": states,
    }
