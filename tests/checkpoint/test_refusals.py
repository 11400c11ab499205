"""Everything that refuses: with a message that names the thing, and with nothing written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from flashnorm import (
    CheckpointError,
    Consumer,
    FoldError,
    Plan,
    QuantizedError,
    Span,
    fold_checkpoint,
)

from .helpers import (
    INDEX,
    SINGLE,
    llama_plan,
    llama_tensors,
    snapshot,
    write_checkpoint,
    write_raw,
)

HALF = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}


@pytest.fixture
def src(tmp_path):
    return write_checkpoint(tmp_path / "src", llama_tensors(2), shards=3)


@pytest.fixture
def single(tmp_path):
    return write_checkpoint(tmp_path / "src", llama_tensors(2))


def refused(src, match, error=CheckpointError, plan=None, dst=None, **options):
    """fold_checkpoint raises, the source is as it was, and nothing stands beside it."""
    before, beside = snapshot(src), sorted(src.parent.rglob("*"))
    with pytest.raises(error, match=match):
        fold_checkpoint(src, dst or src.parent / "dst", plan=plan or llama_plan(2), **options)
    assert sorted(src.parent.rglob("*")) == beside
    assert snapshot(src) == before


def edit_config(src, **values):
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, **values}))


def edit_index(src, change):
    index = json.loads((src / INDEX).read_text())
    change(index["weight_map"])
    (src / INDEX).write_text(json.dumps(index))


# --- the target -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["directory", "file", "dangling link"])
def test_target_exists(src, make):
    dst = src.parent / "dst"
    if make == "directory":
        dst.mkdir()
    elif make == "file":
        dst.write_text("")
    else:
        dst.symlink_to(src.parent / "nowhere")
    refused(src, "dst exists already: remove it or choose another name")


def test_target_is_the_source(src):
    refused(src, "is the source itself", dst=src)


def test_target_is_the_source_by_a_link(src):
    (src.parent / "link").symlink_to(src)
    refused(src, "is the source itself", dst=src.parent / "link")


def test_target_inside_the_source(src):
    refused(src, "lies inside of the source", dst=src / "folded")


def test_target_without_a_parent(src):
    refused(src, "does not exist", dst=src.parent / "no" / "dst")


def test_source_is_not_a_directory(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory: give the local directory"):
        fold_checkpoint(tmp_path / "none", tmp_path / "dst", plan=llama_plan(1))
    assert not list(tmp_path.iterdir())


def test_no_config(src):
    (src / "config.json").unlink()
    refused(src, r"has no config\.json")


def test_invalid_config(src):
    (src / "config.json").write_text("{")
    refused(src, r"config\.json is not valid JSON")


def test_config_is_no_object(src):
    (src / "config.json").write_text("[]")
    refused(src, r"config\.json is not a JSON object")


def test_no_weights(single):
    (single / SINGLE).unlink()
    refused(single, "has neither model.safetensors nor model.safetensors.index.json")


def test_only_pickle(single):
    (single / SINGLE).rename(single / "pytorch_model.bin")
    refused(single, "weights as pickle files only.*from_pretrained and write it with save_pretrain")


def test_both_layouts(single):
    (single / INDEX).write_text("{}")
    refused(single, "holds both model.safetensors and model.safetensors.index.json")


def test_no_weight_map(src):
    (src / INDEX).write_text("{}")
    refused(src, "has no weight_map")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b", "..", "", 3])
def test_shard_names_stay_in_the_directory(src, name):
    edit_index(src, lambda weights: weights.update({"lm_head.weight": name}))
    refused(src, "which is not a plain file name")


def test_missing_shard(src):
    (src / "model-00002-of-00003.safetensors").unlink()
    refused(src, "the shard model-00002-of-00003.safetensors named by .* is missing from src")


def test_key_of_the_index_is_not_in_its_shard(src):
    edit_index(src, lambda weights: weights.update({"model.extra": weights["lm_head.weight"]}))
    refused(src, "places tensor model.extra in model-00003-of-00003.* which does not hold it")


def test_key_of_a_shard_is_not_in_the_index(src):
    edit_index(src, lambda weights: weights.pop("lm_head.weight"))
    refused(src, "tensor lm_head.weight of model-00003.* is missing from model.safetensors.index")


def test_key_in_two_shards(src):
    write_raw(src / "model-00001-of-00003.safetensors", {"lm_head.weight": HALF}, bytes(8))
    edit_index(src, lambda weights: None)
    refused(src, "tensor lm_head.weight is in both model-0000")


# --- attacks on a safetensors header ----------------------------------------------------------

HEADERS = {
    "hole": (
        {"a": HALF, "b": {**HALF, "data_offsets": [16, 24]}},
        bytes(24),
        "tensor b leaves a hole: it starts at 16, 8 was expected",
    ),
    "hole at the start": ({"a": {**HALF, "data_offsets": [8, 16]}}, bytes(16), "leaves a hole"),
    "overlap": (
        {"a": HALF, "b": {**HALF, "data_offsets": [4, 12]}},
        bytes(12),
        "tensor b overlaps the tensor before it",
    ),
    "same bytes twice": ({"a": HALF, "b": HALF}, bytes(8), "tensor b overlaps"),
    "out of bounds": (
        {"a": {**HALF, "shape": [400], "data_offsets": [0, 800]}},
        bytes(8),
        "is truncated: its header claims",
    ),
    "trailing bytes": ({"a": HALF}, bytes(11), "has 3 bytes that no tensor of its header owns"),
    "size": ({"a": {**HALF, "shape": [5]}}, bytes(8), "not the size of BF16"),
    "overflowing shape": ({"a": {**HALF, "shape": [2**62, 2**3]}}, bytes(8), "not the size of"),
    "negative shape": ({"a": {**HALF, "shape": [-4]}}, bytes(8), "the invalid shape"),
    "shape of booleans": ({"a": {**HALF, "shape": [True, 4]}}, bytes(8), "the invalid shape"),
    "shape of fractions": ({"a": {**HALF, "shape": [4.0]}}, bytes(8), "the invalid shape"),
    "negative offset": ({"a": {**HALF, "data_offsets": [-8, 0]}}, bytes(8), "invalid offsets"),
    "reversed offsets": ({"a": {**HALF, "data_offsets": [8, 0]}}, bytes(8), "invalid offsets"),
    "three offsets": ({"a": {**HALF, "data_offsets": [0, 8, 9]}}, bytes(8), "invalid offsets"),
    "dtype": ({"a": {**HALF, "dtype": "BF17"}}, bytes(8), "the unknown dtype 'BF17'"),
    "dtype of a list": ({"a": {**HALF, "dtype": []}}, bytes(8), "the unknown dtype"),
    "missing field": ({"a": {"dtype": "BF16", "shape": [4]}}, bytes(8), "needs exactly dtype"),
    "extra field": ({"a": {**HALF, "more": 1}}, bytes(8), "needs exactly dtype"),
    "tensor is no object": ({"a": 7}, b"", "needs exactly dtype"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not a map of strings"),
    "no object": ([], b"", "the header is not a JSON object"),
    "leading space": (b' {"a": 1}', b"", "the header is not a JSON object"),
    "invalid JSON": (b'{"a": ', b"", "the header is not valid JSON"),
    "invalid UTF-8": (b'{"\xff": 1}', b"", "the header is not valid JSON"),
    "deep JSON": (b'{"a":' + b"[" * 200_000, b"", "the header is not valid JSON"),
    "duplicate": (b'{"a": 1, "a": 1}', b"", "duplicate key 'a'"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_invalid_header(single, name):
    header, data, match = HEADERS[name]
    write_raw(single / SINGLE, header, data)
    refused(single, match)


def test_file_shorter_than_its_header_claims(src):
    file = src / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(src, "model-00002-of-00003.safetensors is truncated: its header claims")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is truncated: 0 bytes hold no safetensors header"),
        (b"1234567", "is truncated: 7 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "claims a length of 1000 bytes, the file has 10"),
        ((2**40).to_bytes(8, "little") + b"{}", "over the limit of 100000000"),
        (b"\xff" * 16, "over the limit of 100000000"),
    ],
)
def test_header_length(single, content, match):
    (single / SINGLE).write_bytes(content)
    refused(single, match)


# --- quantized, folded already ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_quantized_by_the_config(src, method, nested):
    value = {"quantization_config": {"quant_method": method, "bits": 4}}
    edit_config(src, **({"text_config": value} if nested else value))
    match = f"method {method};.*Dequantize first, or fold before quantizing; deferral"
    refused(src, match, error=QuantizedError)


def test_quantized_by_the_dtype_of_a_tensor(tmp_path):
    tensors = llama_tensors(2)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    src = write_checkpoint(tmp_path / "src", tensors)
    match = f"the tensor {name} is stored as F8_E4M3.*deferral, which needs no fold"
    refused(src, match, error=QuantizedError)


def test_quantized_integers(tmp_path):
    tensors = llama_tensors(2)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"] * 100).to(torch.int8)
    src = write_checkpoint(tmp_path / "src", tensors)
    refused(src, "the tensor lm_head.weight is stored as I8", error=QuantizedError)


def test_a_dequantized_gguf_folds_and_loses_the_stale_mark(src):
    edit_config(src, quantization_config={"quant_method": "gguf"})
    fold_checkpoint(src, src.parent / "dst", plan=llama_plan(2))
    after = json.loads((src.parent / "dst" / "config.json").read_text())
    assert "quantization_config" not in after


@pytest.mark.parametrize(
    "mark", [{"flashnorm_folded": True}, {"flash_norm": True}, {"rms_norm_has_weight": False}]
)
@pytest.mark.parametrize("nested", [False, True])
def test_folded_already(src, mark, nested):
    edit_config(src, **({"text_config": mark} if nested else mark))
    refused(
        src, f"was folded already, as {next(iter(mark))} in config.json says: fold the original"
    )


def test_a_second_fold(src):
    fold_checkpoint(src, src.parent / "once", plan=llama_plan(2))
    refused(src.parent / "once", "was folded already", dst=src.parent / "twice")


# --- the plan does not fit --------------------------------------------------------------------


def test_a_missing_consumer(tmp_path):
    tensors = llama_tensors(2)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    src = write_checkpoint(tmp_path / "src", tensors)
    refused(src, r"model.layers.1.mlp.up_proj.weight is not in the checkpoint under a name.*fold_")


def test_a_missing_gain(tmp_path):
    tensors = llama_tensors(2)
    del tensors["model.norm.weight"]
    src = write_checkpoint(tmp_path / "src", tensors)
    refused(src, r"the parameter model.norm.weight is not in the checkpoint")


def test_a_plan_for_another_model(src):
    site = llama_plan(2).sites[1]
    merged = Consumer("model.layers.0.mlp.experts.w13", 2, (Span(0, 0, 48),))
    plan = Plan((replace(site, consumers=(*site.consumers, merged)),))
    match = "parameter model.layers.0.mlp.experts.w13, which the model does not have: make"
    refused(src, match, plan=plan)


@pytest.mark.parametrize("prefix", ["transformer.", "encoder.model."])
def test_names_that_transformers_does_not_load(tmp_path, prefix):
    tensors = {prefix + key: value for key, value in llama_tensors(1).items()}
    src = write_checkpoint(tmp_path / "src", tensors)
    refused(src, "is not in the checkpoint under a name from which", plan=llama_plan(1))


def test_two_tensors_for_one_parameter(tmp_path):
    """With and without the prefix of the base model: transformers loads one of them."""
    tensors = llama_tensors(1)
    tensors["norm.weight"] = tensors["model.norm.weight"] * 2
    src = write_checkpoint(tmp_path / "src", tensors)
    match = r"holds norm\.weight beside model\.norm\.weight, and transformers loads only one"
    refused(src, match, plan=llama_plan(1))


def test_a_config_that_does_not_fit(tmp_path):
    src = write_checkpoint(tmp_path / "src", llama_tensors(1), intermediate_size=96)
    match = r"holds model.layers.0.mlp.gate_proj.weight in the shape \[80, 48\].*says \[96, 48\]"
    refused(src, match, plan=llama_plan(1))


def test_a_config_that_transformers_cannot_read(src):
    edit_config(src, num_attention_heads="four")
    refused(src, "transformers cannot read the config.json of src")


def test_a_tied_weight_stored_twice(tmp_path):
    tensors = llama_tensors(1)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    src = write_checkpoint(tmp_path / "src", tensors, tie_word_embeddings=True)
    reader = Consumer("model.embed_tokens.weight", 1, (Span(0, 0, 48),))
    site = replace(llama_plan(1).sites[-1], consumers=(reader,))
    refused(src, "stores the tied weight .* twice, as", plan=Plan((site,)))


@pytest.mark.parametrize(
    ("axis", "span"),
    [(0, Span(0, 0, 49)), (1, Span(1, 0, 48)), (1, Span(0, 1, 48)), (2, Span(0, 0, 1))],
)
def test_another_layout_than_planned(src, axis, span):
    consumer = Consumer("model.layers.0.self_attn.q_proj.weight", axis, (span,))
    plan = Plan((replace(llama_plan(2).sites[0], consumers=(consumer,)),))
    refused(src, r"q_proj.weight of shape \[48, 48\] cannot absorb the gain", plan=plan)


def test_a_stored_head_that_differs_from_its_tie(src):
    plan = llama_plan(2, untied=True)
    refused(src, "ties lm_head.weight to model.embed_tokens.weight.* they differ", plan=plan)


# --- numbers ----------------------------------------------------------------------------------


def test_overflow_in_fp16_is_found_in_the_middle(tmp_path):
    tensors = llama_tensors(2, dtype=torch.float16)
    tensors["model.layers.1.mlp.gate_proj.weight"][7, 9] = 3e4
    tensors["model.layers.1.post_attention_layernorm.weight"][9] = -284
    src = write_checkpoint(tmp_path / "src", tensors, shards=3)
    match = "model.layers.1.mlp.gate_proj.weight: folding the gain .* overflows torch.float16"
    refused(src, match, error=FoldError)


def test_a_gain_that_is_not_finite(tmp_path):
    tensors = llama_tensors(2)
    tensors["model.norm.weight"][0] = float("nan")
    src = write_checkpoint(tmp_path / "src", tensors)
    refused(src, "model.norm.weight: the gain holds NaN or infinity", error=FoldError)


def test_an_error_of_the_caller_leaves_nothing(src):
    def progress(done, total, name):
        raise RuntimeError("the caller's own")

    refused(src, "the caller's own", error=RuntimeError, progress=progress)
