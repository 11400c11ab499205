"""Models whose weights stay on disk compute the same, and verify gives the same verdict on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flashnorm
from flashnorm import CheckpointError, FlashNormError, QuantizedError
from flashnorm.checkpoint import disk_model
from flashnorm.checkpoint.disk_model import on_disk, opened_on_disk
from flashnorm.checkpoint.disk_rows import DiskTensor
from flashnorm.loading import load_model
from flashnorm.verification import streaming
from flashnorm.verification.precision import in_dtype
from flashnorm.verification.report import Report

from . import tiny

IDS = torch.arange(40)[None] * 7 % 199


@pytest.fixture(autouse=True)
def everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_model, "SMALL", 0)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return tiny._random(
        GPT2LMHeadModel, GPT2Config, n_positions=512, tie_word_embeddings=True, n_inner=96
    )


def deepseek() -> Any:
    """Latent attention, merged experts and a router that stays in float32."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return tiny._random(
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )


MODELS = [tiny.llama, tiny.gemma, tiny.bert, tiny.t5, tiny.mixtral, gpt2, deepseek]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model once for each dtype."""
    done: dict[Any, Path] = {}

    def save(make: Callable[[], Any], dtype: torch.dtype = torch.float32, **how: Any) -> Path:
        key = (make, dtype, *how.items())
        if key not in done:
            done[key] = tmp_path_factory.mktemp(make.__name__)
            make().to(dtype).save_pretrained(done[key], **how)
        return done[key]

    return save


def run(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more)[0]


def alone(model: Any) -> Any:
    """Experts one after the other, as they are computed from disk."""
    disk_model.set_experts_(model.config, "eager")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_a_model_on_disk_computes_the_same(saved: Any, make: Any, dtype: torch.dtype) -> None:
    path = saved(make, dtype, max_shard_size="40KB")
    memory = alone(load_model(path))
    with opened_on_disk(path) as disk:
        held = on_disk(disk)
        matrices = {n for n, p in memory.named_parameters(remove_duplicate=False) if p.ndim > 1}
        assert held.keys() == matrices
        assert {n: p.dtype for n, p in memory.named_parameters()} == {
            n: p.dtype for n, p in disk.named_parameters() if n in dict(memory.named_parameters())
        }
        loose = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(run(disk), run(memory), atol=loose, rtol=loose)
        with in_dtype(disk, torch.float64), in_dtype(memory, torch.float64):
            wide = disk.get_parameter(next(iter(held)))
            assert (type(wide), wide.dtype) == (DiskTensor, torch.float64)
            torch.testing.assert_close(run(disk), run(memory), atol=1e-6, rtol=1e-6)
        assert on_disk(disk) == held  # the very same tensors are back


def check(reference: Path, candidate: Any, **options: Any) -> Report:
    return flashnorm.verify(reference, candidate, **{"tokens": 160, "sample": 128, **options})


MODES = {
    "compat": {},
    "strict": {"strict": True},
    "untied": {"untie": True},
    "strict, untied": {"strict": True, "untie": True},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma, tiny.mixtral, deepseek])
def test_a_fold_is_right_from_disk_and_from_memory(
    saved: Any, tmp_path: Path, make: Any, mode: dict[str, bool]
) -> None:
    path = saved(make, torch.bfloat16)
    flashnorm.fold_checkpoint(path, tmp_path / "folded", **mode)
    memory, disk = check(path, tmp_path / "folded"), check(path, tmp_path / "folded", stream=True)
    assert (memory.ok, disk.ok) == (True, True), f"{memory}\n{disk}"
    assert (disk.rows, disk.greedy) == (128, None)
    assert (disk.width, disk.depth, disk.stored) == (memory.width, disk.depth, "bfloat16")
    assert disk.perplexity is not None
    assert disk.perplexity.tokens == 127
    assert any("read from disk while they were used" in note for note in disk.notes)
    assert 0 < disk.float64.max <= disk.float64_bound


def spoil(path: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors[name])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_wrong_weight_is_found_and_its_layer_is_named(saved: Any, tmp_path: Path) -> None:
    path, folded = saved(tiny.llama), tmp_path / "folded"
    flashnorm.fold_checkpoint(path, folded)
    spoil(folded, "model.layers.1.mlp.up_proj.weight", lambda w: w[3, 5].add_(1.0))
    memory, disk = check(path, folded), check(path, folded, stream=True)
    for report in (memory, disk):
        assert not report.ok
        assert report.first_wrong_layer is not None
        assert report.first_wrong_layer.path == "model.layers.1.mlp.up_proj"


def test_a_gain_that_was_not_folded_is_found(saved: Any, tmp_path: Path) -> None:
    path, folded = saved(tiny.llama), tmp_path / "folded"
    flashnorm.fold_checkpoint(path, folded)
    original = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    spoil(folded, name, lambda w: w.copy_(original[name]))
    report = check(path, folded, stream=True)
    assert report.first_wrong_layer is not None
    assert report.first_wrong_layer.path == "model.layers.0.self_attn.q_proj"


def test_a_live_model_against_one_on_disk(saved: Any) -> None:
    path = saved(tiny.llama)
    model = flashnorm.fold_(load_model(path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = check(path, model, stream=True)
    assert report.ok, str(report)
    assert report.greedy is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_read_from_disk(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tiny.llama)
    size = streaming._bytes_in_memory(path)
    numbers = sum(p.numel() for p in load_model(path).parameters())
    assert size == numbers * (4 + 8)
    for free, streamed in ((size / streaming.SHARE - 2, True), (size / streaming.SHARE + 2, False)):
        monkeypatch.setattr(streaming, "available_memory", lambda free=free: free)
        assert streaming.streams([path, path], None) is streamed
        assert streaming.streams([path, path], not streamed) is not streamed
    monkeypatch.setattr(streaming, "available_memory", lambda: 1000)
    assert not streaming.streams([nn.Linear(2, 2)], None)
    assert not streaming.streams(["organization/model"], None)
    report = check(path, path)
    assert report.ok
    assert report.greedy is None


def test_what_cannot_be_streamed_is_refused(saved: Any, tmp_path: Path) -> None:
    path = saved(tiny.llama)
    with pytest.raises(FlashNormError, match=r"x/y cannot be read from disk .* local directory"):
        check(path, "x/y", stream=True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FlashNormError, match=r"model\.gguf cannot be read from disk"):
        check(path, tmp_path / "model.gguf", stream=True)


def test_damage_is_named(saved: Any, tmp_path: Path) -> None:
    path = saved(tiny.llama)
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())

    def write(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))

    name = "model.layers.1.mlp.down_proj.weight"
    write({key: value for key, value in tensors.items() if key != name}, config)
    with (
        pytest.raises(CheckpointError, match=f"lacks 1 tensors of its model, the first is {name}"),
        opened_on_disk(tmp_path),
    ):
        pass
    write({**tensors, name: tensors[name][:, :-1].contiguous()}, config)
    with pytest.raises(CheckpointError, match="down_proj"), opened_on_disk(tmp_path):
        pass
    write(tensors, config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(QuantizedError, match="gptq"), opened_on_disk(tmp_path):
        pass


def test_files_are_closed(saved: Any) -> None:
    path = saved(tiny.llama, torch.float32, max_shard_size="40KB")
    with opened_on_disk(path) as model:
        run(model)
        shards = next(iter(on_disk(model).values())).held.weight.shards
        held = len(shards._files)
        assert held == len(shards.source.shards)
        open_now = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert shards._files == {}
    if open_now is not None:
        assert len(os.listdir("/proc/self/fd")) == open_now - held


BOUNDED = """
import resource, sys
import torch, transformers
from pathlib import Path
from flashnorm.checkpoint.disk_model import opened_on_disk, on_disk
from flashnorm.verification.precision import float64_truth, in_dtype
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
path, ids = Path(sys.argv[1]), torch.arange(16)[None]
with opened_on_disk(path) as model, in_dtype(model, torch.float64), float64_truth():
    held = on_disk(model).values()
    before = peak()
    model(input_ids=ids)
    print(peak() - before, sum(t.numel() for t in held) * 8, max(t.numel() for t in held) * 8)
"""


def test_memory_is_bounded_by_one_weight(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    width = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_hidden_layers": 12}
    LlamaForCausalLM(LlamaConfig(**width, **heads)).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown, everything, largest = map(int, done.stdout.split())
    assert everything > 380e6
    assert grown < 60e6 + 4 * largest
