"""Every architecture that transformers reads from GGUF files: the same model, packed."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import modeling_gguf_pytorch_utils as older
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

import flashnorm
from flashnorm.compat.transformers_names import experts_of
from flashnorm.gguf import loaded
from flashnorm.loading import quiet_transformers
from flashnorm.quantized.packed_tensor import PackedTensor
from tests.gguf import files
from tests.gguf.files import Q

# What transformers' own table calls them, where a file has another name.
OTHERWISE = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "minimax_m2": "minimax-m2"}
NOT_HERE = {
    "general": "no architecture",
    "tokenizer": "no architecture",
    "mistral": "files call it llama",
    "gpt_oss": "transformers has no names for its experts: refused, in test_damaged.py",
    "deci": "transformers has no config of that name",
    "gemma4": "its table of 262144 words in each layer is not in the metadata: too large here",
}
# Matrices that a file cannot hold as they are used: columns in another order.
DENSE = {"qwen35": 3, "qwen35moe": 3}


def test_a_new_architecture_is_noticed():
    told = {*older.GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS}
    known = {OTHERWISE.get(name, name) for name in told}
    assert known - NOT_HERE.keys() == files.MODELS.keys()


def theirs(model: Any, file: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same file as transformers loads it: dequantized."""
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        return type(model).from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 2, 3, 40, 5], [7, 150, 9, 3, 3]])
    other = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **other).logits


@pytest.mark.filterwarnings("ignore:.*encountered in log:RuntimeWarning")
@pytest.mark.parametrize("architecture", files.MODELS)
def test_the_same_numbers_and_every_matrix_packed(architecture, tmp_path):
    file = files.model_file(tmp_path, architecture)
    model: Any = flashnorm.load_gguf(file)
    expected = theirs(model, file)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    done, state = loaded(model), expected.state_dict()
    for name, found in model.state_dict().items():
        plain = found.dequantize() if isinstance(found, PackedTensor) else found
        assert torch.equal(plain, state[name]), name
    assert len(done.dense) == DENSE.get(architecture, 0)
    assert not done.unused
    quantized = sum(tensor.tensor_type == Q.Q8_0 for tensor in stored.values())
    merged = sum(name.endswith("gate_up_proj") for name in done.packed)  # two of a file
    assert len(done.packed) + len(done.dense) + merged == quantized > 8
    assert all(parameter.is_meta is False for parameter in model.parameters())
    assert not model.training
    # The same numbers in products of the same shapes: q8_0 has no minima, nothing rounds otherwise.
    assert torch.equal(logits(model), logits(expected))


def test_the_memory_is_that_of_the_file(tmp_path):
    for architecture in files.MODELS.keys() - DENSE.keys():
        file = files.model_file(tmp_path, architecture)
        model = flashnorm.load_gguf(file)
        held = {id(p): p for p in model.parameters()}.values()
        found = sum((p.packed if isinstance(p, PackedTensor) else p).nbytes for p in held)
        assert found <= sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors), architecture
        for p in held:
            inner = p.packed if isinstance(p, PackedTensor) else p
            assert inner.untyped_storage().nbytes() == inner.nbytes, architecture


def test_a_tied_head_is_the_embedding(tmp_path):
    model: Any = flashnorm.load_gguf(files.model_file(tmp_path, "llama"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied: Any = flashnorm.load_gguf(files.model_file(tmp_path, "llama", tied=False))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert isinstance(untied.lm_head.weight, PackedTensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_another_dtype(dtype, tmp_path):
    """Numbers rounded once; vectors too; what transformers keeps in float32 is so here."""
    file = files.model_file(tmp_path, "t5")
    model: Any = flashnorm.load_gguf(file, dtype)
    wide = dict(flashnorm.load_gguf(file).named_parameters())
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert all(name.endswith("wo.weight") for name in kept)
    assert bool(kept) == (dtype == torch.float16)
    for name, found in model.named_parameters():
        plain = found.dequantize() if isinstance(found, PackedTensor) else found
        expected = wide[name].dequantize() if isinstance(found, PackedTensor) else wide[name]
        assert torch.equal(plain, expected.to(found.dtype)), name
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16], ids=str)
def test_matrices_in_halves_are_never_widened(kind, tmp_path):
    file = files.model_file(tmp_path, "llama", kind)
    own = torch.float16 if kind == Q.F16 else torch.bfloat16
    for dtype in (torch.float32, own):
        model: Any = flashnorm.load_gguf(file, dtype)
        assert torch.equal(logits(model), logits(theirs(model, file, dtype)))
        packed = [isinstance(p, PackedTensor) for p in model.parameters() if p.dim() == 2]
        assert all(packed) if dtype != own else not any(packed)


def test_matrices_of_two_formats_in_one_parameter_are_dense_and_said_so(tmp_path, caplog):
    def kind(name: str) -> Q:
        return Q.Q8_0 if "gate_exps" in name else Q.Q4_0

    file = files.model_file(tmp_path, "qwen3moe", kind)
    model: Any = flashnorm.load_gguf(file)
    why = "it is made of q4_0 and q8_0"
    assert {*loaded(model).dense.values()} == {why}
    assert f"is dequantized: {why}" in caplog.text
    expected = theirs(model, file)
    assert torch.equal(logits(model), logits(expected))


def test_experts_are_taken_one_by_one(tmp_path):
    """And are right where each token has its own."""
    model: Any = flashnorm.load_gguf(files.model_file(tmp_path, "qwen3moe"))
    experts = model.model.layers[0].mlp.experts
    assert experts_of(model.config) == "eager"
    one = experts.gate_up_proj[2]
    assert isinstance(one, PackedTensor)
    assert one.packed.data_ptr() != experts.gate_up_proj.packed.data_ptr()
    assert one.packed.untyped_storage().data_ptr() == (
        experts.gate_up_proj.packed.untyped_storage().data_ptr()
    )
    assert torch.equal(one.dequantize(), experts.gate_up_proj.dequantize()[2])


class Other(older.LlamaTensorProcessor):
    """What another version of transformers might do to the matrices of one name."""

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        done = super().process(weights, name, **kwargs)
        if ".ffn_up." in name:
            done = done._replace(weights=done.weights * np.float32(2))
        elif ".ffn_gate." in name:
            done.weights[...] = done.weights[::-1].copy()
        elif ".attn_v." in name:
            done = done._replace(weights=done.weights[::-1])
        elif ".attn_output." in name:
            done = done._replace(weights=done.weights[:, ::-1])
        return done


def test_whatever_transformers_does_to_numbers_is_done(tmp_path, monkeypatch, caplog):
    """Rows stay packed; anything else is computed with numbers, and said."""
    monkeypatch.setitem(older.TENSOR_PROCESSORS, "llama", Other)
    file = files.model_file(tmp_path, "llama")
    model: Any = flashnorm.load_gguf(file)
    assert torch.equal(logits(model), logits(theirs(model, file)))
    assert {name.split(".")[4] for name in loaded(model).dense} == {
        "up_proj",
        "gate_proj",
        "o_proj",
    }
    assert caplog.text.count("is dequantized: transformers changes more than the order") == 6
    assert isinstance(model.model.layers[0].self_attn.v_proj.weight, PackedTensor)
