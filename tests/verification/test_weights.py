"""verify_weights makes its own plan: folds of every kind, of models of several architectures."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from flashnorm import fold_checkpoint, verify_weights
from flashnorm.checkpoint.header import read_header

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, **HEADS)),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SMALL, **HEADS, **EXPERTS)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, tie_word_embeddings=True)),
}
FOLDS = [
    ("gemma2", {}),
    ("gemma2", {"untie": True}),
    ("gemma2", {"strict": True, "untie": True}),
    ("qwen3-moe", {}),
    ("qwen3-moe", {"strict": True}),
    ("gpt2", {}),
    ("gpt2", {"strict": True}),
    ("gpt2", {"center": True}),
    ("gpt2", {"center": True, "untie": True}),
    ("gpt-neox", {"untie": True}),
]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """The name and the place of a small random model, every gain and bias too."""
    cls, config = MODELS[request.param]
    torch.manual_seed(1)
    made = cls(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("models") / request.param
    made.save_pretrained(path, max_shard_size="30KB")
    return request.param, path


def spoilt(path):
    """Flip the last bit of the last tensor of the last shard; returns the tensor's name."""
    file = sorted(path.glob("*.safetensors"))[-1]
    header, data = read_header(file), bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    return max(header.entries, key=lambda entry: entry.end).name


def test_folds_are_proved_with_a_plan_of_their_own(model, tmp_path):
    name, a = model
    for number, options in enumerate(options for one, options in FOLDS if one == name):
        b = tmp_path / str(number)
        plan = fold_checkpoint(a, b, **options)
        report = verify_weights(a, b)
        assert report.ok, f"{options}: {report}"
        assert report.folded == len(plan.folded) > 0
        assert report.mode == ("strict" if options.get("strict") else "compat")
        assert bool(plan.untied) == bool(options.get("untie"))
        # embeddings are tied to the head, so centering takes weights of its own there
        assert bool(plan.centerings) == ({"center", "untie"} <= options.keys())
        assert report.notes == ()


def test_the_marker_is_asked_how_not_trusted_what(model, tmp_path):
    """A config that says less was folded, or nothing untied, over tensors that say otherwise."""
    _, a = model
    fold_checkpoint(a, tmp_path / "b", untie=True)
    wrong = spoilt(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    gain = config["flashnorm"]["folded"].pop()
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    report = verify_weights(a, tmp_path / "b")
    assert [one.tensor for one in report.wrong] == [wrong]
    assert [one.file for one in report.files] == ["config.json"]
    assert "flashnorm.folded is" in report.files[0].problem
    assert gain in json.loads((a / "model.safetensors.index.json").read_text())["weight_map"]


def test_inputs_of_the_fold(model, tmp_path):
    name, a = model
    if name != "gemma2":
        pytest.skip("one model is enough")
    inputs = [{"input_ids": torch.tensor([[1, 2, 3]])}, {"input_ids": torch.tensor([[4]])}]
    fold_checkpoint(a, tmp_path / "b", example_inputs=inputs)
    assert verify_weights(a, tmp_path / "b", example_inputs=inputs).ok


def test_a_copy_of_any_model_takes_no_plan(model, tmp_path, monkeypatch):
    from flashnorm.verification import weights

    _, a = model
    shutil.copytree(a, tmp_path / "b")
    monkeypatch.setattr(weights, "inspect_stored", None)
    assert verify_weights(a, tmp_path / "b").mode == "copy"
    wrong = spoilt(tmp_path / "b")
    assert [one.tensor for one in verify_weights(a, tmp_path / "b").wrong] == [wrong]
