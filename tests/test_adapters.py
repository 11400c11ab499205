"""Adapters of real PEFT: base + adapter against folded base + folded adapter, in true float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flashnorm
from flashnorm.adapters.config import WEIGHTS
from flashnorm.adapters.tensors import parameter_axes
from flashnorm.checkpoint.header import Entry

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.adapting import (  # noqa: E402 (after the question whether PEFT is there)
    ATTENTION,
    EVERY,
    EXACT,
    EXPERTS,
    FEED_FORWARD,
    WRONG,
    Made,
    folded_model,
    logits,
    made,
    quietly,
)
from tests.errors import relative  # noqa: E402


def error_of(case: Made, out: Path, **options) -> float:
    """The error of folded base + folded adapter, after showing that the fold was needed."""
    model, plan = folded_model(case, **options)
    flashnorm.fold_adapter(case.adapter, plan, out)
    assert relative(logits(model, None, case.inputs), case.logits) > WRONG, "the adapter does more"
    assert relative(logits(model, case.adapter, case.inputs), case.logits) > WRONG
    return relative(logits(model, out, case.inputs), case.logits)


CONFIGS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "every target": {"target_modules": EVERY, "lora_dropout": 0.2},
    "patterns": {
        "target_modules": EVERY,
        "rank_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 5, "lm_head": 2},
    },
    "rslora": {"target_modules": EVERY, "use_rslora": True, "r": 4, "lora_alpha": 3},
    "one layer": {"target_modules": EVERY[:-1], "layers_to_transform": [1]},
    "bias of B": {"target_modules": EVERY, "lora_bias": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "parameters": {
        "target_modules": [],
        "target_parameters": ["q_proj.weight", "up_proj.weight"],
    },
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "reader trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
    "head and its factors": {"target_modules": ["lm_head", "embed_tokens", "k_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [20, 30]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_gotcha_26_a_lora_adapter_follows_the_fold(name, tmp_path):
    """Without the transformation it is wrong, with it exact to float64."""
    assert error_of(made(tmp_path, "llama", **CONFIGS[name]), tmp_path / "out") < EXACT


def test_gotcha_26_dropout_in_training_is_the_same(tmp_path):
    """It acts on each feature alone, before A, so the gain may stand after it."""
    case = made(tmp_path, "llama", target_modules=EVERY, lora_dropout=0.4)
    model, plan = folded_model(case)
    flashnorm.fold_adapter(case.adapter, plan, tmp_path / "out")
    expected = logits(case.model, case.adapter, case.inputs, seed=3)
    assert relative(expected, case.logits) > WRONG, "something is dropped"
    assert relative(logits(model, tmp_path / "out", case.inputs, seed=3), expected) < EXACT


MERGED = {
    "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "one parameter": {"target_modules": ["v_proj"], "target_parameters": EXPERTS[:1]},
    "old names": {"target_modules": [*ATTENTION, *FEED_FORWARD]},
    "everything": {"target_modules": [*EVERY, "gate"], "use_rslora": True},
}


@pytest.mark.parametrize("name", MERGED)
def test_gotcha_26_factors_of_merged_experts(name, tmp_path):
    """3-D parameters: PEFT puts the ranks of all experts side by side."""
    case = made(tmp_path, "qwen3_moe", r=2, **MERGED[name])
    shapes = {k: tuple(v.shape) for k, v in load_file(case.adapter / WEIGHTS).items()}
    assert any("experts" in key and shape[0] in (8, 16) for key, shape in shapes.items())
    assert error_of(case, tmp_path / "out") < EXACT


@pytest.mark.parametrize(
    ("name", "shape"),
    [("qwen3_moe", {"moe_intermediate_size": 32}), ("gpt_oss", {"intermediate_size": 32})],
)
def test_square_experts(name, shape, tmp_path):
    """Where the shapes cannot say which axis A runs along, the module does."""
    case = made(tmp_path, name, shape=shape, target_modules=[], target_parameters=EXPERTS)
    experts = dict(case.model.named_parameters())["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.shape[1] == experts.shape[2]
    assert error_of(case, tmp_path / "out") < EXACT


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_an_older_peft(transposed):
    """It took [experts, out, in] for [experts, in, out]; the shapes of the factors say so."""
    module = torch.nn.Module()
    module.is_transposed = transposed
    module.weight = torch.nn.Parameter(torch.empty(4, 6, 10))
    for axes in ({1: 1, 2: 0}, {1: 0, 2: 1}):
        sizes = {axes[1]: 6, axes[2]: 10}
        factors = {
            "A": Entry("A", "F32", (8, sizes[1]), 0, 0),
            "B": Entry("B", "F32", (sizes[0], 8), 0, 0),
        }
        assert parameter_axes(module, "weight", factors) == axes


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "gemma", "phi3", "qwen3_next"])
def test_other_layouts(name, tmp_path):
    """Transposed experts, 1+w gains, fused readers, gains tiled over heads, routers."""
    targets = {
        "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "mixtral": {"target_modules": ["k_proj"], "target_parameters": EXPERTS},
        "gemma": {"target_modules": ["q_proj", "up_proj"]},
        "phi3": {"target_modules": ["qkv_proj", "gate_up_proj"]},
        "qwen3_next": {"target_modules": ["in_proj_qkvz", "out_proj", "q_proj"]},
    }
    assert error_of(made(tmp_path, name, **targets[name]), tmp_path / "out") < EXACT


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["c_attn", "c_fc", "c_proj"], "lora_dropout": 0.1},
        {"target_modules": ["c_attn"], "lora_bias": True, "use_rslora": True, "r": 3},
        {"target_modules": ["c_attn"], "rank_pattern": {"h.0.attn.c_attn": 3}},
        {
            "target_modules": ["c_attn", "c_proj"],
            "bias": "lora_only",
            "use_rslora": True,
            "alpha_pattern": {"h.1.attn.c_attn": 3},
        },
        {"target_modules": ["c_attn", "c_fc"], "bias": "all"},
        {"target_modules": ["c_attn"], "init_lora_weights": "gaussian"},
        {"target_modules": ["c_proj"], "modules_to_save": ["c_fc"]},
    ],
    ids=["plain", "lora_bias", "ranks", "lora_only", "all", "gaussian", "modules_to_save"],
)
def test_biases_of_norms_with_transposed_layers(config, tmp_path):
    """E2: what `scaling · B A β` leaves over goes into the bias of B, or into the adapter's own."""
    case = made(tmp_path, "gpt2", fan_in_fan_out=True, **config)
    _, plan = folded_model(case)
    assert "folded" in {site.bias for site in plan.sites}
    assert error_of(case, tmp_path / "out") < EXACT


@pytest.mark.parametrize("name", ["gpt_neox", "gptj", "opt", "bloom", "phi", "falcon"])
def test_biases_of_norms_in_other_models(name, tmp_path):
    """E2 and E13, in parallel and sequential blocks, with fused readers."""
    config = {"target_modules": "all-linear"}
    assert error_of(made(tmp_path, name, **config), tmp_path / "out") < EXACT


def test_trained_biases_of_norms_stay_divided_by_the_gain(tmp_path):
    """E13 for the adapter's own β: it replaces the β/g of the folded base."""
    case = made(tmp_path, "gptj", target_modules=["q_proj"], bias="all")
    _, plan = folded_model(case)
    assert "carried" in {site.bias for site in plan.sites}
    assert error_of(case, tmp_path / "out") < EXACT


def test_shared_modules(tmp_path):
    """A block that several layers share stands under all of its names in the adapter."""
    case = made(tmp_path, "zamba2", target_modules=[*ATTENTION, "in_proj", "gate_up_proj"])
    assert error_of(case, tmp_path / "out") < EXACT


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_in", "dense", "dense_4h_to_h"]},
        {"target_modules": "all-linear", "lora_bias": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["dense"], "bias": "lora_only"},
        {"target_modules": ["query_key_value"], "modules_to_save": ["dense_4h_to_h"]},
        {"target_modules": ["dense"], "trainable_token_indices": [20, 30]},
    ],
    ids=["writers", "lora_bias", "all", "lora_only", "modules_to_save", "tokens"],
)
def test_writers_of_a_centered_stream(config, tmp_path):
    """E3: the delta of a writer loses its mean over the features too."""
    case = made(tmp_path, "gpt_neox", **config)
    model, plan = folded_model(case, center=True)
    assert {site.centering for site in plan.sites} == {"folded"}
    flashnorm.fold_adapter(case.adapter, plan, tmp_path / "out")
    assert relative(logits(model, tmp_path / "out", case.inputs), case.logits) < EXACT
    without = dataclasses.replace(plan, centerings=())
    quietly(flashnorm.fold_adapter, case.adapter, without, tmp_path / "without")
    assert relative(logits(model, tmp_path / "without", case.inputs), case.logits) > WRONG


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *((name, "all-linear") for name in ("gpt2", "gptj", "phi", "bloom")),
        ("gpt2", ["wte", "lm_head", "mlp.c_proj"]),
    ],
)
def test_centered_and_untied_models(name, targets, tmp_path):
    """All of it at once: gains, biases of both kinds, writers, heads, transposed layers."""
    case = made(tmp_path, name, target_modules=targets)
    model, plan = folded_model(case, center=True, untie=True)
    assert plan.centerings
    flashnorm.fold_adapter(case.adapter, plan, tmp_path / "out")
    assert relative(logits(model, case.adapter, case.inputs), case.logits) > WRONG
    assert relative(logits(model, tmp_path / "out", case.inputs), case.logits) < EXACT


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "gpt_neox"])
def test_on_a_base_that_was_folded_on_disk(name, tmp_path):
    """Everything as a user does it, from directories alone."""
    experts = {"target_parameters": EXPERTS} if "moe" in name else {}
    targets = "all-linear" if "gpt" in name else [*ATTENTION, "lm_head"]
    case = made(tmp_path, name, target_modules=targets, **experts)
    plan = flashnorm.fold_checkpoint(case.base, tmp_path / "folded")
    assert len(plan.folded) >= 4
    flashnorm.fold_adapter(case.adapter, None, tmp_path / "out", folded=tmp_path / "folded")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "folded", dtype=torch.float64, attn_implementation="eager"
    )
    if experts:
        model.set_experts_implementation("batched_mm")
    assert relative(logits(model, case.adapter, case.inputs), case.logits) > WRONG
    assert relative(logits(model, tmp_path / "out", case.inputs), case.logits) < EXACT
    named = quietly(peft.AutoPeftModelForCausalLM.from_pretrained, tmp_path / "out")
    assert named.get_base_model().config.flashnorm_folded
