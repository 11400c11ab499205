"""Small GGUF files with random weights, for every architecture that transformers reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.integrations import GGUF_CONFIG_MAPPING

from flashnorm.compat import gguf_names
from flashnorm.compat.transformers_names import builder, router
from flashnorm.loading import model_class

Q = gguf.GGMLQuantizationType
PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = {
    **PLAIN,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
T5: dict[str, Any] = {
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 160,
    "is_gated_act": True,
    "feed_forward_proj": "gated-gelu",
    "n_positions": 64,
}
WINDOW = {"head_dim": 16, "sliding_window": 8}
# By the name in a file: the type of config, and what it is made with.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**PLAIN, "head_dim": 16}),
    "qwen2": ("qwen2", PLAIN),
    "qwen3": ("qwen3", {**PLAIN, "head_dim": 128}),
    "phi3": ("phi3", PLAIN),
    "falcon": ("falcon", {**PLAIN, "new_decoder_architecture": False}),
    "stablelm": ("stablelm", PLAIN),
    "starcoder2": ("starcoder2", PLAIN),
    "nemotron": ("nemotron", PLAIN),
    "gemma2": ("gemma2", {**PLAIN, **WINDOW}),
    "gemma3": ("gemma3_text", {**PLAIN, **WINDOW}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_ctx": 64, "vocab_size": 160}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160}),
    "mamba": ("mamba", {**PLAIN, "intermediate_size": 128, "state_size": 16, "time_step_rank": 32}),
    "qwen2moe": ("qwen2_moe", {**PLAIN, **EXPERTS}),
    "qwen3moe": ("qwen3_moe", {**PLAIN, **EXPERTS, "head_dim": 16}),
    "minimax-m2": ("minimax_m2", {**PLAIN, **LOCAL, "head_dim": 16, "rotary_dim": 8}),
    "t5": ("t5", T5),
    "umt5": ("umt5", T5),
    "lfm2": (
        "lfm2",
        {
            **PLAIN,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "qwen35": ("qwen3_5_text", HYBRID),
    "qwen35moe": ("qwen3_5_moe_text", {**HYBRID, **EXPERTS, "moe_intermediate_size": 32}),
}


def values(shape: tuple[int, ...], kind: Q, rng: np.random.Generator) -> np.ndarray:
    """Random numbers as a file holds them."""
    if kind in QUICK and np.prod(shape) > 1 << 20:
        return random_blocks(shape, kind, rng)
    numbers = rng.standard_normal(shape).astype(np.float32) * 0.1
    try:
        return gguf.quants.quantize(numbers, kind)
    except NotImplementedError:
        return random_blocks(shape, kind, rng)


# Where the blocks of types that gguf cannot write hold float16 scales, in bytes.
SCALES = {
    Q.Q2_K: (80, 82),
    Q.Q3_K: (108,),
    Q.Q4_K: (0, 2),
    Q.Q5_K: (0, 2),
    Q.Q6_K: (208,),
    Q.IQ4_XS: (0,),
    Q.IQ2_XXS: (0,),
    Q.IQ3_S: (0,),
}


QUICK = {Q.Q4_0: (0,), **SCALES}  # and those of which random bytes are made faster than numbers


def random_blocks(shape: tuple[int, ...], kind: Q, rng: np.random.Generator) -> np.ndarray:
    """Random bytes, with scales that are small and finite."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // elements
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for place in QUICK[kind]:
        scale = rng.uniform(1e-4, 4e-3, count).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(count, 2)
    return blocks.reshape(*shape[:-1], -1)


def write(
    target: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: Iterator[tuple[str, tuple[int, ...], Q]],
    seed: int = 0,
) -> Path:
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(target, arch=architecture)
    writer.add_name(f"random {architecture}")
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, shape, kind in tensors:
        found = values(shape, kind, rng)
        if name.endswith("ssm_a"):  # the log of its negative is taken
            found = -np.abs(found) - np.float32(0.1)
        writer.add_tensor(name, found, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def model_file(
    folder: Path,
    architecture: str,
    kind: Q | Callable[[str], Q] = Q.Q8_0,
    without: str = "",
    tied: bool = True,
    **changes: Any,
) -> Path:
    """A file of a small model: matrices of a type (or that of their name), vectors in float32.

    without: a part of the names of tensors that are left out.
    """
    name, options = MODELS[architecture]
    config = transformers.CONFIG_MAPPING[name](**{**options, **changes})
    shapes = _by_rules(architecture, config) or _by_processor(architecture, config)
    tensors = (
        (tensor, shape, _kind(tensor, shape, kind))
        for tensor, shape in shapes.items()
        if not (without and without in tensor) and not (tied and tensor == "output.weight")
    )
    told = _metadata(architecture, name.removesuffix("_text"), config)
    return write(folder / f"{architecture}.gguf", architecture, told, tensors)


def _kind(name: str, shape: tuple[int, ...], kind: Q | Callable[[str], Q]) -> Q:
    wanted = kind(name) if callable(kind) else kind
    whole = shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if len(shape) > 1 and whole and "conv" not in name.split(".")[-2] else Q.F32


def _metadata(architecture: str, name: str, config: Any) -> dict[str, Any]:
    """What the config says, by the keys that transformers reads."""
    found: dict[str, Any] = {"tokenizer.ggml.padding_token_id": 0}
    for key, ours in GGUF_CONFIG_MAPPING.get(name, {}).items():
        value = getattr(config, ours, None) if ours else None
        if value is not None:
            found[f"{architecture}.{key}"] = value
    words = [f"w{i}" for i in range(config.vocab_size)]
    told = HYBRIDS.get(architecture, lambda config: {})(config)
    found |= {f"{architecture}.{key}": value for key, value in told.items()}
    return found | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": words}


def _lfm2(config: Any) -> dict[str, Any]:
    full = [kind == "full_attention" for kind in config.layer_types]
    return {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": [config.num_key_value_heads * is_full for is_full in full],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }


def _qwen35(config: Any) -> dict[str, Any]:
    inner = config.linear_value_head_dim * config.linear_num_value_heads
    return {
        "context_length": 64,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "full_attention_interval": 4,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": inner,
        "rope.freq_base": 10000.0,
        "rope.dimension_sections": [3, 3, 2, 0],
        "rope.dimension_count": 16,
        "feed_forward_length": getattr(config, "intermediate_size", 96),
    }


def _qwen35moe(config: Any) -> dict[str, Any]:
    return _qwen35(config) | {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


HYBRIDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lfm2": _lfm2,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35moe,
}
# What gguf's own table does not name.
RENAMED = {"linear_attn.dt_bias": "ssm_dt.bias", "linear_attn.A_log": "ssm_a"}


def empty(config: Any) -> Any:
    """The model of a config, on no device."""
    with torch.device("meta"):
        return builder(model_class(config))(config)


def _by_rules(architecture: str, config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of a file whose architecture has rules; none where it has none."""
    if (rules := gguf_names.conversions(architecture, config)) is None:
        return {}
    model, found = empty(config), {}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for key, value in model.state_dict().items():
        stem, _, suffix = key.rpartition(".")
        block = ".".join(key.split(".")[2:3])
        special = next((new for old, new in RENAMED.items() if key.endswith(old)), "")
        shape = tuple(size for size in value.shape if size != 1)
        if special:
            found[f"blk.{block}.{special}"] = shape
        elif key.endswith("gate_up_proj"):
            each = (shape[0], shape[1] // 2, shape[2])
            found |= {f"blk.{block}.ffn_{half}_exps.weight": each for half in ("gate", "up")}
        else:
            name = table.get_name(stem) or table.get_name(key)
            found[f"{name}.{'weight' if suffix == 'down_proj' else suffix}"] = shape
    route = router(model, rules)
    assert {route(name)[0] for name in found} <= model.state_dict().keys()
    return found


def _by_processor(architecture: str, config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that a file of the model holds, by what transformers makes of each."""
    model, found = empty(config), {}
    processor = gguf_names.processor(architecture, config.to_dict())
    names = gguf_names.parameter_names(model, processor, ["all of them"])
    sizes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for tensor, parameter in names.items():
        if parameter in sizes:
            full = f"{tensor}.weight" if tensor.endswith("_exps") else tensor
            found[full] = _before(processor, full, names, parameter, sizes[parameter])
    return found


def _before(
    processor: Any, full: str, names: dict[str, str], parameter: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape in a file that becomes this one."""
    squeezed = tuple(size for size in shape if size != 1)
    half = (shape[0], shape[1] // 2, *shape[2:]) if len(shape) == 3 else shape
    for before in (half, shape, shape[::-1], squeezed):
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        try:
            made = processor.process(
                weights=np.full(before, -1, np.float32),
                name=full,
                tensor_key_mapping=names,
                parsed_parameters=parsed,
            )
        except (ValueError, RuntimeError, IndexError):
            continue
        kept = parsed["tensors"].get(parameter, made.weights)
        if tuple(kept.shape) == shape:
            return before
    raise AssertionError(f"no shape of {full} becomes {shape}")
