"""Checkpoints whose tensors are not the model's parameters: the fold on disk and in stock
transformers is, bit for bit, the fold in memory."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashnorm
from flashnorm import CheckpointError, TraceError, fold_checkpoint
from flashnorm.checkpoint import mapping
from flashnorm.loading import model_class
from flashnorm.rewrite import apply_plan_
from tests.zoo import UNBUILDABLE, causal_lm_types, tiny_inputs, tiny_model

from .helpers import SINGLE, load, snapshot

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

# Stored one tensor per expert, or merged, or under other names: what the hub has.
SEPARATE = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "phimoe", "jamba"]
MERGED = ["gpt_oss", "llama4_text", "granitemoe"]


def save_tiny(name, path, dtype=torch.float32, **options):
    tiny_model(name).to(dtype).save_pretrained(path, **options)
    return path


def from_pretrained(path):
    config = transformers.AutoConfig.from_pretrained(path)
    return model_class(config).from_pretrained(path, dtype="auto", output_loading_info=True)


def fold_both(src, dst, **options):
    """Fold on disk and in memory, by one plan; returns it and both models in stock transformers."""
    memory, _ = from_pretrained(src)
    try:
        plan = fold_checkpoint(src, dst, **options)
    except TraceError:  # the forward asks for values, so that only a live model tells the plan
        plan = flashnorm.inspect(memory, tiny_inputs(memory))
        fold_checkpoint(src, dst, plan=plan, **options)
    if plan.folded:
        apply_plan_(memory, plan)
    disk, info = from_pretrained(dst)
    return plan, memory, disk, info


def assert_same_state(disk, memory):
    found, wanted = disk.state_dict(), memory.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def experts(path):
    """How many tensors of a checkpoint are one expert's."""
    return sum(bool(re.search(r"experts\.\d+\.", key)) for key in load(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("name", SEPARATE + MERGED)
def test_experts_fold_on_disk_as_in_memory(tmp_path, name, original, dtype):
    """In the form that the hub has, and in that of the model."""
    src = save_tiny(name, tmp_path / "src", dtype, save_original_format=original)
    assert bool(experts(src)) == (original and name in SEPARATE)
    before = snapshot(src)
    plan, memory, disk, info = fold_both(src, tmp_path / "dst")
    assert any("experts" in consumer.parameter for s in plan.sites for consumer in s.consumers)
    assert_same_state(disk, memory)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert load(tmp_path / "dst").keys() == load(src).keys()
    assert snapshot(src) == before


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "gpt2", "ernie4_5_moe"])
def test_strict_loads_as_the_fold_in_memory(tmp_path, name):
    src = save_tiny(name, tmp_path / "src", max_shard_size="100KB")
    plan, memory, disk, info = fold_both(src, tmp_path / "dst", strict=True)
    assert_same_state(disk, memory)
    gone = {gain.parameter for gain in plan.gains()}
    gone |= {b.parameter for b in plan.norm_biases() if b.folded}
    assert set(info["missing_keys"]) == gone
    assert len(load(src).keys() - load(tmp_path / "dst").keys()) == len(gone)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in causal_lm_types() if name not in UNBUILDABLE])
def test_every_type_folds_on_disk_as_in_memory(tmp_path, name):
    src = tmp_path / "src"
    try:
        save_tiny(name, src)
        _plan, memory, disk, info = fold_both(src, tmp_path / "dst")
    except ImportError as error:
        pytest.skip(f"transformers itself needs a package that is not installed: {error}")
    assert_same_state(disk, memory)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def edited(path, change):
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})


def test_an_expert_is_missing(tmp_path):
    src = save_tiny("mixtral", tmp_path / "src")
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edited(src, lambda tensors: tensors.pop(key))
    plan = flashnorm.inspect(src)
    match = r"layers\.1\.mlp\.experts\.gate_up_proj in a way not followed .*[Ss]izes"
    with pytest.raises(CheckpointError, match=match):
        fold_checkpoint(src, tmp_path / "dst", plan=plan)
    assert not (tmp_path / "dst").exists()


def test_an_expert_of_another_dtype_keeps_it(tmp_path):
    """Each tensor is rounded once, to its own dtype."""
    src = save_tiny("mixtral", tmp_path / "src")
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edited(src, lambda tensors: tensors.update({key: tensors[key].to(torch.bfloat16)}))
    plan = fold_checkpoint(src, tmp_path / "dst")
    before, after = load(src), load(tmp_path / "dst")
    gain = before["model.layers.1.post_attention_layernorm.weight"]
    assert gain.shape == (before[key].shape[1],)
    assert len(plan.folded) == 5
    assert torch.equal(after[key], (before[key].float() * gain).to(torch.bfloat16))


def test_a_conversion_that_is_no_move_is_refused(tmp_path, monkeypatch):
    """Values that are averaged on load have no place of their own in the checkpoint."""
    from transformers import core_model_loading

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: torch.stack(tensors) * 2}

    src = save_tiny("mixtral", tmp_path / "src")
    plan = flashnorm.inspect(src)
    monkeypatch.setattr(core_model_loading.MergeModulelist, "convert", convert)
    mapping._answer.cache_clear()
    with pytest.raises(CheckpointError, match=r"converts tensors into .* in a way not followed"):
        fold_checkpoint(src, tmp_path / "dst", plan=plan)


@pytest.mark.parametrize("name", ["bert", "zamba"])
def test_other_ties_stay_when_the_head_is_untied(tmp_path, name):
    """One setting ties the head, its bias, and blocks that are shared by layers."""
    src = save_tiny(name, tmp_path / "src")
    with pytest.raises(CheckpointError, match=r"untying the head also parts .* fold without untie"):
        fold_checkpoint(src, tmp_path / "dst", untie=True)
    assert not (tmp_path / "dst").exists()


def test_strict_needs_a_gain_of_one_where_none_is_stored(tmp_path):
    """Its norm is 1 + w, but transformers begins with w = 1."""
    src = save_tiny("nemotron", tmp_path / "src")
    match = r"strict mode removes .*, and transformers would then begin with a value other than 0,"
    with pytest.raises(CheckpointError, match=match):
        fold_checkpoint(src, tmp_path / "dst", strict=True)
    assert not (tmp_path / "dst").exists()
