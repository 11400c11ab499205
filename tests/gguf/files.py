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

Q = gguf.GGMLQuantizationType
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 160, "num_hidden_layers": 2}
PLAIN = {**SIZES, **HEADS, "max_position_embeddings": 64}
# By the name in a file: the type of config, and what it is made with.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**PLAIN, "head_dim": 16}),
    "mistral": ("mistral", {**PLAIN, "head_dim": 16}),
    "qwen2": ("qwen2", PLAIN),
    "qwen3": ("qwen3", {**PLAIN, "head_dim": 128}),
    "phi3": ("phi3", {**PLAIN, "pad_token_id": 0}),
    "falcon": ("falcon", {**PLAIN, "new_decoder_architecture": False}),
    "stablelm": ("stablelm", PLAIN),
    "starcoder2": ("starcoder2", PLAIN),
    "nemotron": ("nemotron", PLAIN),
    "gemma2": ("gemma2", {**PLAIN, "head_dim": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**PLAIN, "head_dim": 16, "sliding_window": 8}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_ctx": 64, "vocab_size": 50257}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160}),
    "mamba": ("mamba", {**SIZES, "intermediate_size": 128, "state_size": 16, "time_step_rank": 4}),
    "qwen2moe": ("qwen2_moe", {**PLAIN, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3moe": ("qwen3_moe", {**PLAIN, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
}


def values(shape: tuple[int, ...], kind: Q, rng: np.random.Generator) -> np.ndarray:
    """Random numbers as a file holds them."""
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


def random_blocks(shape: tuple[int, ...], kind: Q, rng: np.random.Generator) -> np.ndarray:
    """Random bytes, with scales that are small and finite."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // elements
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for place in SCALES[kind]:
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
            found = -np.abs(found)
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
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def model_file(
    folder: Path,
    architecture: str,
    kind: Q | Callable[[str], Q] = Q.Q8_0,
    leave_out: str = "",
    tie: bool = True,
    **changes: Any,
) -> Path:
    """A file of a small model: matrices of a type (or that of their name), vectors in float32."""
    name, options = MODELS[architecture]
    config = transformers.CONFIG_MAPPING[name](**{**options, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    told = _metadata(architecture, name.removesuffix("_text"), config)
    shapes = _shapes(architecture, model, config)
    tensors = (
        (tensor, shape, _kind(tensor, shape, kind))
        for tensor, shape in shapes.items()
        if not (leave_out and leave_out in tensor) and not (tie and tensor == "output.weight")
    )
    return write(folder / f"{architecture}.gguf", architecture, told, tensors)


def _kind(name: str, shape: tuple[int, ...], kind: Q | Callable[[str], Q]) -> Q:
    wanted = kind(name) if callable(kind) else kind
    whole = shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if len(shape) > 1 and whole and "ssm_conv" not in name else Q.F32


def _metadata(architecture: str, name: str, config: Any) -> dict[str, Any]:
    found = {}
    for key, ours in GGUF_CONFIG_MAPPING[name].items():
        value = getattr(config, ours, None) if ours else None
        if ours == "rope_theta":
            value = getattr(config, "rope_parameters", None) and 10000.0
        if value is not None:
            found[f"{architecture}.{key}"] = value
    return found


def _shapes(architecture: str, model: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that a file of the model holds, by what transformers makes of each."""
    described = config.to_dict()
    processor = gguf_names.processor(architecture, described)
    names = gguf_names.parameter_names(model, processor, ['all of them'])
    sizes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {}
    for tensor, parameter in names.items():
        if parameter not in sizes:
            continue
        full = tensor if tensor.endswith((".weight", ".bias")) else _suffixed(tensor)
        found[full] = _before(processor, full, tensor, names, sizes[parameter])
    return found


def _suffixed(tensor: str) -> str:
    return f"{tensor}.weight" if "_exps" in tensor else tensor


def _before(
    processor: Any, full: str, tensor: str, names: dict[str, str], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape in a file that becomes this one."""
    halves = (shape[0], shape[1] // 2, *shape[2:]) if len(shape) == 3 else shape
    squeezed = tuple(size for size in shape if size != 1)
    for before in (shape, shape[::-1], squeezed, halves):
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
        kept = parsed["tensors"].get(names[tensor])
        after = tuple(kept.shape) if kept is not None else tuple(made.weights.shape)
        if after == shape and not (before == shape and halves != shape and "gate_exps" in full):
            return before
    raise AssertionError(f"no shape of {full} becomes {shape}")
