"""Small Llama-shaped checkpoints written by hand, the plans that fit them, and their hashes."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flashnorm.plan import Consumer, Gain, Plan, Site, Span

HIDDEN, INNER, VOCAB = 48, 80, 96
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def llama_plan(
    layers: int,
    *,
    hidden: int = HIDDEN,
    offset: float = 0.0,
    prefix: str = "model.",
    untied: bool = False,
    head: bool = True,
) -> Plan:
    """The plan of a Llama: input norm into q, k, v; post-attention norm into gate and up."""
    spans = (Span(0, 0, hidden),)

    def site(path: str, readers: list[str]) -> Site:
        consumers = tuple(Consumer(f"{name}.weight", 1, spans) for name in readers)
        weight = Gain(f"{path}.weight", offset, 1.0)
        return Site(path, "rms", hidden, 1e-6, "folded", "", consumers, weight)

    sites = []
    for layer in (f"{prefix}layers.{i}" for i in range(layers)):
        attention = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        sites.append(site(f"{layer}.input_layernorm", attention))
        mlp = [f"{layer}.mlp.{name}_proj" for name in ("gate", "up")]
        sites.append(site(f"{layer}.post_attention_layernorm", mlp))
    if head:
        sites.append(site(f"{prefix}norm", ["lm_head"]))
    else:
        sites.append(Site(f"{prefix}norm", "rms", hidden, 1e-6, "kept", "the head is tied"))
    copies = (("lm_head.weight", f"{prefix}embed_tokens.weight"),) if untied else ()
    return Plan(tuple(sites), untied=copies)


def llama_tensors(
    layers: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    offset: float = 0.0,
    hidden: int = HIDDEN,
    inner: int = INNER,
    vocab: int = VOCAB,
    tied: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Random weights and gains `1 + 0.3·N(0, 1)`, stored less `offset`."""
    rng = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * 0.05).to(dtype)

    def gain() -> torch.Tensor:
        return (1 - offset + 0.3 * torch.randn(hidden, generator=rng)).to(dtype)

    found = {"model.embed_tokens.weight": weight(vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = gain()
        for name in "qkvo":
            found[f"{layer}.self_attn.{name}_proj.weight"] = weight(hidden, hidden)
        found[f"{layer}.post_attention_layernorm.weight"] = gain()
        found[f"{layer}.mlp.gate_proj.weight"] = weight(inner, hidden)
        found[f"{layer}.mlp.up_proj.weight"] = weight(inner, hidden)
        found[f"{layer}.mlp.down_proj.weight"] = weight(hidden, inner)
    found["model.norm.weight"] = gain()
    if not tied:
        found["lm_head.weight"] = weight(vocab, hidden)
    return found


def write_checkpoint(
    path: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, **config: Any
) -> Path:
    """A checkpoint directory with config, tokenizer and `shards` files; gains may be in another."""
    path.mkdir()
    head = {"tie_word_embeddings": False, "rms_norm_eps": 1e-06, **llama_config(tensors), **config}
    (path / "config.json").write_text(json.dumps(head, indent=2))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    if shards == 1:
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
        return path
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for i, (key, tensor) in enumerate(tensors.items()):
        parts[names[i * shards // len(tensors)]][key] = tensor
    for name, part in parts.items():
        save_file(part, path / name, metadata={"format": "pt"})
    write_index(path, {key: name for name, part in parts.items() for key in part}, tensors)
    return path


def llama_config(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The config of a Llama with these tensors, whatever their prefix; of no known model else."""
    shapes = {re.sub(r".*layers\.\d+\.|^.*\.(?=embed)", "", k): t.shape for k, t in tensors.items()}
    if "embed_tokens.weight" not in shapes:
        return {"model_type": "custom"}
    vocab, hidden = shapes["embed_tokens.weight"]
    layers = {match[1] for key in tensors if (match := re.search(r"layers\.(\d+)\.", key))}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": shapes["mlp.gate_proj.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": 4,
    }


def write_index(path: Path, places: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    metadata = {
        "total_parameters": sum(t.numel() for t in tensors.values()),
        "total_size": sum(t.nbytes for t in tensors.values()),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2))


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file from a header given as an object, or as raw bytes of JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def load(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory."""
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def header_order(file: Path) -> list[str]:
    """Tensor names of a safetensors file in the order of their bytes."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    fields = json.loads(raw[8 : 8 + length])
    fields.pop("__metadata__", None)
    return sorted(fields, key=lambda name: fields[name]["data_offsets"])


def snapshot(path: Path) -> dict[str, str]:
    """The SHA-256 of every file below `path`, hidden ones too."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
