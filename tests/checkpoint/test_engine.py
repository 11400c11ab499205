"""What an engine is given, tensor by tensor: the same bits as a fold on disk."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from flashnorm import fold_checkpoint
from flashnorm.checkpoint.engine import open_streamed
from flashnorm.errors import CheckpointError, FoldError, QuantizedError

from .helpers import llama_plan, llama_tensors, load, snapshot, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*(became subnormal|left out)")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, **HEADS)),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SMALL, **HEADS, **EXPERTS)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, tie_word_embeddings=True)),
}


@pytest.fixture(params=MODELS)
def checkpoint(request, tmp_path):
    """A small random model on disk, every gain and bias too."""
    cls, config = MODELS[request.param]
    torch.manual_seed(1)
    model = cls(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "src", max_shard_size="30KB")
    return tmp_path / "src"


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("untie", [False, True])
def test_folded_while_loading_is_folded_on_disk(checkpoint, tmp_path, untie):
    before = snapshot(checkpoint)
    streamed = open_streamed(checkpoint, untie=untie)
    plan = fold_checkpoint(checkpoint, tmp_path / "dst", untie=untie)
    same(dict(streamed.tensors()), load(tmp_path / "dst"))
    assert plan.folded
    assert streamed.folded == len(plan.folded)
    assert streamed.untied == bool(plan.untied)
    assert snapshot(checkpoint) == before


def test_a_fold_of_before_comes_as_it_is(checkpoint, tmp_path):
    fold_checkpoint(checkpoint, tmp_path / "dst")
    streamed = open_streamed(tmp_path / "dst")
    same(dict(streamed.tensors()), load(tmp_path / "dst"))
    assert streamed.folded == 0
    assert str(streamed) == "folded before"


def test_what_a_strict_fold_left_out_is_put_back(checkpoint, tmp_path):
    fold_checkpoint(checkpoint, tmp_path / "compat")
    fold_checkpoint(checkpoint, tmp_path / "strict", strict=True)
    assert load(tmp_path / "strict").keys() < load(tmp_path / "compat").keys()
    same(dict(open_streamed(tmp_path / "strict").tensors()), load(tmp_path / "compat"))


def test_a_strict_fold_of_an_older_version_says_so(tmp_path):
    source = write_checkpoint(tmp_path / "src", llama_tensors(1))
    fold_checkpoint(source, tmp_path / "dst", strict=True, plan=llama_plan(1))
    file = tmp_path / "dst" / "config.json"
    config = json.loads(file.read_text())
    del config["flashnorm"]["absent"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="dst was folded with strict by a version"):
        open_streamed(tmp_path / "dst")


@pytest.mark.parametrize("key", ["flash_norm", "flashnorm_folded"])
def test_what_another_tool_folded_is_refused(tmp_path, key):
    source = write_checkpoint(tmp_path / "src", llama_tensors(1), **{key: True})
    with pytest.raises(CheckpointError, match=f"folded by another tool, as {key}"):
        open_streamed(source)


def test_a_sub_model_that_was_folded_is_refused(tmp_path):
    config = {"text_config": {"flash_norm": True}}
    source = write_checkpoint(tmp_path / "src", llama_tensors(1), **config)
    with pytest.raises(CheckpointError, match="folded already, as flash_norm"):
        open_streamed(source, plan=llama_plan(1))


def test_quantized_weights_are_refused(tmp_path):
    source = write_checkpoint(
        tmp_path / "src", llama_tensors(1), quantization_config={"quant_method": "gptq"}
    )
    with pytest.raises(QuantizedError, match="gptq"):
        open_streamed(source)


def test_a_fold_that_overflows_is_refused_by_name(tmp_path):
    tensors = llama_tensors(1, dtype=torch.float16)
    tensors["model.norm.weight"][3] = 6e4
    tensors["lm_head.weight"][0, 3] = 6e4
    source = write_checkpoint(tmp_path / "src", tensors)
    with pytest.raises(FoldError, match=r"lm_head\.weight"):
        dict(open_streamed(source, plan=llama_plan(1)).tensors())


def test_weights_that_become_subnormal_are_counted(tmp_path):
    tensors = llama_tensors(1, dtype=torch.float16)
    tensors["model.norm.weight"][3] = 1e-7
    source = write_checkpoint(tmp_path / "src", tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="became subnormal"):
            dict(open_streamed(source, plan=llama_plan(1)).tensors())
