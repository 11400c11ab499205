"""A directory with good files to damage, a target to write, and things around it to leave alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flashnorm.adapters.base import Base, open_base
from flashnorm.plan import Plan
from tests.checkpoint.helpers import llama_plan, llama_tensors, write_checkpoint

SHAPE = {"hidden": 8, "inner": 12, "vocab": 16}
TARGETS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "alpha_pattern": {"layers.0.self_attn.q_proj": 8, r"layers\.\d+\.mlp": 2},
    "target_modules": ["q_proj", "o_proj", "up_proj"],
    "target_parameters": [],
    "bias": "none",
    "use_rslora": False,
    "init_lora_weights": True,
}

Snapshot = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Sandbox:
    """`around` holds everything; only `target` may appear in it, and `scratch` be changed."""

    around: Path

    @staticmethod
    def at(place: Path) -> Sandbox:
        """A new sandbox in an empty directory."""
        found = Sandbox(place)
        found.scratch.mkdir()
        (place / "victim.txt").write_text("leave me alone")
        (place / "victims").mkdir()
        (place / "victims" / "x.safetensors").write_bytes(b"and me")
        write_checkpoint(found.single, llama_tensors(1, **SHAPE))
        write_checkpoint(found.sharded, llama_tensors(1, **SHAPE), shards=2)
        found.adapter.mkdir()
        config = {**ADAPTER, "base_model_name_or_path": str(found.single)}
        (found.adapter / "adapter_config.json").write_text(json.dumps(config))
        save_file(adapter_tensors(), found.adapter / "adapter_model.safetensors")
        return found

    @property
    def scratch(self) -> Path:
        return self.around / "scratch"

    @property
    def target(self) -> Path:
        return self.around / "target"

    @property
    def single(self) -> Path:
        return self.around / "single"

    @property
    def sharded(self) -> Path:
        return self.around / "sharded"

    @property
    def adapter(self) -> Path:
        return self.around / "adapter"

    @cached_property
    def base(self) -> Base:
        return open_base(self.single, {})

    @cached_property
    def plan(self) -> Plan:
        return llama_plan(1, hidden=SHAPE["hidden"])

    @cached_property
    def gguf(self) -> Path:
        from tests.gguf import files

        folder = self.around / "gguf"
        folder.mkdir()
        return files.model_file(folder, "llama", files.Q.Q4_0)

    @cached_property
    def good(self) -> Snapshot:
        """What lies around the target before any attack."""
        _ = self.gguf, self.base.parameters, self.plan
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        """Size, time of the last change and mode of everything but scratch and target."""
        return dict(_looked_at(str(self.around), {"scratch", "target"}))


def _looked_at(folder: str, but: set[str]) -> Iterator[tuple[str, tuple[int, int, int]]]:
    for entry in os.scandir(folder):
        if entry.name in but:
            continue
        stat = entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            yield entry.path, (0, 0, stat.st_mode)
            yield from _looked_at(entry.path, set())
        else:
            yield entry.path, (stat.st_size, stat.st_mtime_ns, stat.st_mode)


def adapter_tensors() -> dict[str, torch.Tensor]:
    hidden, inner = SHAPE["hidden"], SHAPE["inner"]
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    sizes["mlp.up_proj"] = (inner, hidden)
    rng, found = torch.Generator().manual_seed(1), {}
    for name in TARGETS:
        out, width = sizes[name]
        key = f"base_model.model.model.layers.0.{name}"
        found[f"{key}.lora_A.weight"] = torch.randn(2, width, generator=rng)
        found[f"{key}.lora_B.weight"] = torch.randn(out, 2, generator=rng)
    return found


def link(source: Path, place: Path, but: tuple[str, ...] = ()) -> Path:
    """A directory with the files of another one as hard links, which cost nothing to make."""
    place.mkdir()
    for file in source.iterdir():
        if file.name not in but:
            os.link(file, place / file.name)
    return place


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file as a value, and the bytes behind it."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]
