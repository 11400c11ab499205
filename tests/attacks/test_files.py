"""The smallest files that once crashed a reader, filled the memory, or had no end."""

from __future__ import annotations

import json
import os
import struct
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file

import flashnorm
from flashnorm.checkpoint.header import read_header
from flashnorm.checkpoint.source import INDEX, SINGLE, open_source, read_config
from flashnorm.content import why_damaged
from flashnorm.errors import CheckpointError, FlashNormError, TraceError
from flashnorm.gguf import header as gguf_header
from flashnorm.graph import build
from flashnorm.loading import load_model, model_class
from flashnorm.reading import MAX_DEPTH, parse_json, read_text
from tests.checkpoint.helpers import llama_tensors, write_checkpoint, write_raw

SHAPE = {"hidden": 8, "inner": 12, "vocab": 16}
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@pytest.fixture
def single(tmp_path):
    return write_checkpoint(tmp_path / "src", llama_tensors(1, **SHAPE))


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "src", llama_tensors(1, **SHAPE), shards=2)


def edit_config(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


# --- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deep"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested deeper than 100"),
        ('{"a":' * (MAX_DEPTH + 2) + "1" + "}" * (MAX_DEPTH + 2), "nested deeper than 100"),
        ("9" * 41, "a number of 41 digits"),
        ("9" * 5000, "a number of 5000 digits"),
        ('{"a": ["\\ud800"]}', "half of a character"),
        ('{"\\uDFFF": 1}', "half of a character"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_json_that_does_harm_later(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_json_of_any_other_kind_is_read():
    assert parse_json('{"a": "\\ud83d\\ude00", "b": [1e400, NaN]}')["a"] == "\U0001f600"
    assert parse_json("9" * 40) == 10**40 - 1
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(deep)) == deep


def test_a_key_twice():
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="duplicate key 'a'"):
        parse_json('{"a": 1, "a": 2}', unique=True)


def test_a_text_that_is_too_long(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_text(tmp_path / "x", most=5) == "12345"
    with pytest.raises(ValueError, match="longer than 4 bytes"):
        read_text(tmp_path / "x", most=4)


# --- what is no file ----------------------------------------------------------------------------


@needs_pipes
@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
@pytest.mark.parametrize("name", ["config.json", INDEX, SINGLE])
def test_what_is_no_file_is_not_read(single, name, kind):
    if name == INDEX:
        (single / SINGLE).unlink()
    file = single / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(
        CheckpointError, match=r"no regular file|is missing from src|not valid JSON"
    ):
        open_source(single)
    with pytest.raises(FlashNormError):
        flashnorm.fold_checkpoint(single, single.parent / "dst")


@needs_pipes
def test_a_pipe_in_place_of_a_shard_or_a_gguf_file(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no regular file"):
        gguf_header.read(tmp_path / "x.gguf")
    assert why_damaged(tmp_path / "x.gguf") == ""


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is not a directory"):
        flashnorm.fold_checkpoint(tmp_path / "a", tmp_path / "dst")


# --- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([1] * 65, "the invalid shape"),
        ([2**63], "the invalid shape"),
        ([10**39] * 60, "the invalid shape"),
        ([0, 2**32], "the invalid shape"),
        ([2**20, 0, 2**20], "the invalid shape"),
        ([1] * 100_000, r"the invalid shape .{200}… \(300000 characters\)"),
    ],
    ids=["axes", "size", "product", "empty", "emptier", "long"],
)
def test_shapes_that_would_fill_the_memory(tmp_path, shape, said):
    file = tmp_path / "x.safetensors"
    write_raw(file, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    with pytest.raises(CheckpointError, match=said):
        read_header(file)


def test_an_empty_tensor_with_a_long_axis_folds(single):
    """What is known of its elements takes no memory, as there are none."""
    save_file({"empty": torch.empty(0, 2**30), **llama_tensors(1, **SHAPE)}, single / SINGLE)
    flashnorm.fold_checkpoint(single, single.parent / "dst")
    assert read_header(single.parent / "dst" / SINGLE).entries


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300 + ".safetensors",
        ".flashnorm-journal.json",
        ".hidden.safetensors",
        "config.json",
        "model-00001-of-00002.safetensors.tmp",
        "..\\x.safetensors/../y.safetensors",
        "a\0b.safetensors",
        "\u202esrotcnes.safetensors",
    ],
)
def test_names_of_shards_that_are_none(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"is not a plain file name that ends in \.safetensors"
    ):
        open_source(sharded)


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"num_labels": 2**31},
        {"num_local_experts": 1e12},
        {"text_config": {"n_layer": 10**8}},
        {"backbones": [{"depth": 10**8}]},
    ],
)
def test_a_config_that_asks_for_too_much(single, config):
    edit_config(single, **config)
    for act in (read_config, flashnorm.inspect, load_model):
        with pytest.raises(CheckpointError, match="no model has more than 100000"):
            act(single)


def test_large_numbers_that_count_no_parts(single):
    edit_config(single, vocab_size_per_layer_input=2**18, max_position_embeddings=2**27)
    assert read_config(single)["vocab_size_per_layer_input"] == 2**18


def test_a_model_of_too_many_modules(single, monkeypatch):
    monkeypatch.setattr(build.few_modules.__wrapped__, "__defaults__", (10,))
    with pytest.raises(TraceError, match="a model of more than 10 modules"):
        flashnorm.inspect(single)


def test_a_matrix_of_too_many_features(single):
    edit_config(single, vocab_size=2**25)
    with pytest.raises(TraceError, match="no model has more than 16777216 features"):
        flashnorm.inspect(single)


@pytest.mark.parametrize("kind", [[], {}, 3, True])
def test_a_type_that_is_no_text(single, kind):
    edit_config(single, model_type=kind)
    (single / "only.json").write_text((single / "config.json").read_text())
    for source in (single, single / "only.json"):
        with pytest.raises(CheckpointError, match=r"does not know the model type|no config could"):
            flashnorm.inspect(source)
    assert open_source(single).config["model_type"] == kind


@pytest.mark.parametrize("named", [["pipeline"], ["set_seed"], [3], "LlamaModel", 7])
def test_the_config_chooses_a_model_and_nothing_else(named):
    """Any other name of that library would be called with the config."""
    import transformers

    config = transformers.LlamaConfig()
    config.architectures = named
    assert model_class(config) is transformers.AutoModelForCausalLM
    config.architectures = ["LlamaForSequenceClassification"]
    assert model_class(config) is transformers.LlamaForSequenceClassification


@pytest.mark.parametrize("kind", ["llama", "nobody"])
def test_code_that_comes_with_a_checkpoint_is_never_run(single, kind, monkeypatch):
    """Nor is anybody asked whether it shall be."""
    code = f"open({str(single.parent / 'ran')!r}, 'w')\nclass C: pass\n"
    (single / "evil.py").write_text(code)
    (single / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.C", null]}}'
    )
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.C")
    edit_config(single, auto_map=auto, model_type=kind)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    for act in (flashnorm.inspect, load_model):
        with pytest.raises(FlashNormError) if kind == "nobody" else nullcontext():
            act(single)
    assert not (single.parent / "ran").exists()


def test_pickles_are_not_loaded(single):
    torch.save(llama_tensors(1, **SHAPE), single / "pytorch_model.bin")
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        load_model(single)


# --- GGUF ---------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (struct.pack("<QQ", 2**64 - 1, 0), "counts 18446744073709551615 tensors"),
        (struct.pack("<QQ", 0, 2**64 - 1), "counts 0 tensors and 18446744073709551615"),
        (struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**63), "a text of 9223372036854775808"),
        (
            struct.pack("<QQ", 0, 1) + text(b"a") + struct.pack("<IIQ", 9, 8, 2**60),
            "a list of 1152921504606846976 values",
        ),
        (
            struct.pack("<QQ", 0, 1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1),
            "no lists of kind 9",
        ),
        (
            struct.pack("<QQ", 0, 2)
            + ARCHITECTURE
            + text(b"llama.block_count")
            + struct.pack("<II", 4, 2**32 - 1),
            "llama.block_count is 4294967295",
        ),
        (
            struct.pack("<QQ", 0, 2)
            + ARCHITECTURE
            + text(b"general.alignment")
            + struct.pack("<II", 4, 0),
            "general.alignment is 0",
        ),
    ],
    ids=["tensors", "pairs", "text", "list", "nested", "layers", "alignment"],
)
def test_gguf_counts(tmp_path, body, said):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + body + bytes(64))
    with pytest.raises(CheckpointError, match=said):
        flashnorm.load_gguf(file)
    with pytest.raises(FlashNormError, match=said):
        flashnorm.fold_checkpoint(file, tmp_path / "dst")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]
