"""inspect: from live models, directories, GGUF files and configs of any size."""

import json
import time
from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import flashnorm
from tests.test_rewrite import SHAPE, tiny
from tests.zoo import randomize_

BIG = {
    "llama-3.1-405b": LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "deepseek-v3": DeepseekV3Config(),
    "mixtral-8x7b": MixtralConfig(),
}


def write_config(config, directory):
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    return file


def consumers(plan, path):
    site = next(site for site in plan.sites if site.path == path)
    assert site.gain_state == "folded", site.reason
    prefix = path.rpartition(".")[0] + "."
    return {(c.parameter.removeprefix(prefix), c.axis) for c in site.consumers}


@pytest.mark.parametrize("name", BIG)
def test_a_plan_needs_nothing_but_the_config(name, tmp_path, record_property):
    file = write_config(BIG[name], tmp_path)
    started = time.perf_counter()
    plan = flashnorm.inspect(file)
    print(f"\n{name}: {len(plan.sites)} norms planned in {time.perf_counter() - started:.1f} s")
    per_layer = {"deepseek-v3": 4}.get(name, 2)
    assert len(plan.sites) == per_layer * BIG[name].num_hidden_layers + 1
    assert Counter(site.gain_state for site in plan.sites) == {"folded": len(plan.sites)}
    assert consumers(plan, "model.norm") == {("lm_head.weight", 1)}


def test_the_readers_of_a_671b_model_are_right(tmp_path):
    plan = flashnorm.inspect(write_config(BIG["deepseek-v3"], tmp_path))
    layer = "model.layers.60."
    assert consumers(plan, layer + "input_layernorm") == {
        ("self_attn.q_a_proj.weight", 1),
        ("self_attn.kv_a_proj_with_mqa.weight", 1),
    }
    assert consumers(plan, layer + "self_attn.q_a_layernorm") == {("q_b_proj.weight", 1)}
    assert consumers(plan, layer + "self_attn.kv_a_layernorm") == {("kv_b_proj.weight", 1)}
    assert consumers(plan, layer + "post_attention_layernorm") == {
        ("mlp.gate.weight", 1),
        ("mlp.experts.gate_up_proj", 2),
        ("mlp.shared_experts.gate_proj.weight", 1),
        ("mlp.shared_experts.up_proj.weight", 1),
    }
    assert consumers(plan, "model.layers.0.post_attention_layernorm") == {
        ("mlp.gate_proj.weight", 1),
        ("mlp.up_proj.weight", 1),
    }


def test_a_config_and_the_live_model_give_one_plan(tmp_path):
    model = tiny(tied=True)
    from_config = flashnorm.inspect(write_config(model.config, tmp_path))
    assert from_config.sites == flashnorm.inspect(model).sites
    model.save_pretrained(tmp_path / "saved")
    assert flashnorm.inspect(tmp_path / "saved").sites == from_config.sites


def test_gains_that_are_one_already_are_read_from_the_checkpoint(tmp_path):
    model = tiny()
    flashnorm.fold_(model)
    model.save_pretrained(tmp_path / "folded")
    plan = flashnorm.inspect(tmp_path / "folded")
    assert {site.gain_state for site in plan.sites} == {"none"}
    assert any("folded before" in note for note in plan.notes)


def test_a_tied_head_is_found_without_a_decode_step():
    model = tiny(tied=True)
    ids = torch.arange(10).view(2, 5)
    plan = flashnorm.inspect(model, {"input_ids": ids, "use_cache": False})
    assert plan.sites[-1].gain_state == "kept"
    assert "tied to model.embed_tokens.weight" in plan.sites[-1].reason


def test_a_head_whose_tie_changes_the_forward_is_not_untied():
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=67)
    model = T5ForConditionalGeneration(config)
    randomize_(model, 0)
    plan = flashnorm.inspect(model, untie=True)
    assert not plan.untied
    assert len(plan.folded) == 5
    assert any("does something else" in note for note in plan.notes)


def test_post_norm_reasons_name_the_residual(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=67)
    plan = flashnorm.inspect(write_config(config, tmp_path))
    embeddings, attention, last, head = plan.sites  # the last block's is read by the head alone
    assert [site.gain_state for site in (embeddings, attention, head)] == ["kept"] * 3
    assert (last.gain_state, last.bias) == ("folded", "folded")
    reasons = [site.reason for site in (embeddings, attention)]
    assert any("residual" in reason and "modeling_bert.py" in reason for reason in reasons)


def test_a_quantized_checkpoint_is_planned_as_kept(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = flashnorm.inspect(tmp_path)
    assert {site.gain_state for site in plan.sites} == {"kept"}
    assert all("quantized (gptq)" in site.reason for site in plan.sites)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "nonsense"}', "does not know the model type 'nonsense'"),
        ("{}", "has no model_type"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_config_that_names_no_model(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(flashnorm.CheckpointError, match=message):
            flashnorm.inspect(source)


def test_an_unknown_model_type_is_not_folded_on_disk(tmp_path):
    tiny().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(
        json.dumps(config | {"model_type": "nonsense"})
    )
    with pytest.raises(flashnorm.CheckpointError, match="does not know the model type 'nonsense'"):
        flashnorm.fold_checkpoint(tmp_path / "source", tmp_path / "folded")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("bias", [False, True])
def test_the_encoder_layer_of_torch_itself(bias):
    layer = torch.nn.TransformerEncoderLayer(
        16, 4, 32, norm_first=True, batch_first=True, dtype=torch.float64, bias=bias
    ).eval()
    randomize_(layer, 0)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = layer(x)
    plan = flashnorm.folding(flashnorm.fold_(layer, x))
    assert [site.path for site in plan.sites] == ["norm1", "norm2"]
    assert {site.gain_state for site in plan.sites} == {"folded"}
    # The packed projection adds its bias in an operation of its own, which is no slot for E2.
    assert [s.bias for s in plan.sites] == (["carried", "folded"] if bias else ["none", "none"])
    assert (layer(x) - before).abs().max() < 1e-14


def test_a_model_that_cannot_run_says_what_is_missing():
    class Needs(torch.nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(flashnorm.TraceError, match=r"Needs could not be recorded.*example_inputs="):
        flashnorm.inspect(Needs())


def test_a_model_is_left_as_it_was_found():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).train()
    model.set_attn_implementation("sdpa")
    before = {name: id(value) for name, value in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    flashnorm.inspect(model)
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.training
    assert model.config._attn_implementation == "sdpa"
