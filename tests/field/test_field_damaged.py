"""What people give as a checkpoint: pointers, error pages, weights that contradict their config."""

import gzip
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import flashnorm
from flashnorm.loading import load_model, load_tokenizer
from tests.checkpoint.helpers import llama_tensors, write_checkpoint

SINGLE = "model.safetensors"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
)
LFS = "is a Git LFS pointer, not the file itself: run `git lfs pull`"
PAGE = b"<!DOCTYPE html>\n<html><head><title>401</title></head><body>Sign in</body></html>"
SENT = "is a page that a server sent instead of the file: download it again"


def checkpoint(tmp_path, **options):
    return write_checkpoint(tmp_path / "src", llama_tensors(2, dtype=torch.float32), **options)


def fold(path):
    flashnorm.fold_checkpoint(path, path.parent / "out")


READERS = {"fold": fold, "inspect": flashnorm.inspect, "load": load_model}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, LFS),
        (PAGE, SENT),
        (gzip.compress(b"x" * 999), "is compressed by gzip: unpack it with gunzip"),
        (b"\0" * 4096, "begins with nothing but zeros: its download was interrupted"),
        (b"GGUF" + b"\3\0\0\0" * 99, "is a GGUF file: give it the suffix .gguf"),
        (b"PK\x03\x04" + b"\0" * 99, "is a pickle file of torch"),
    ],
    ids=["pointer", "page", "gzip", "zeros", "gguf", "pickle"],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_field_a_shard_that_is_something_else_is_named_with_its_mend(
    tmp_path, content, said, shards
):
    path = checkpoint(tmp_path, shards=shards)
    shard = sorted(path.glob("*.safetensors"))[-1]
    shard.write_bytes(content)
    for name in ("fold", "load"):
        with pytest.raises(flashnorm.CheckpointError) as error:
            READERS[name](path)
        assert f"{shard.name} {said}" in str(error.value), name
    notes = flashnorm.inspect(path).notes  # the config alone is enough for a plan
    assert any(f"{shard.name} {said}" in note for note in notes)


@pytest.mark.parametrize("length", [0x0280, 0x8B1F, 0x685A42])
def test_field_a_header_whose_length_begins_as_something_else(tmp_path, length):
    """Little-endian, these lengths are the marks of pickle, gzip and bzip2."""
    path = write_checkpoint(tmp_path / "src", {"a": torch.randn(4, 4)})
    shard = path / "model.safetensors"
    data = shard.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    shard.write_bytes(length.to_bytes(8, "little") + data[8:size].ljust(length) + data[size:])
    assert load_file(shard)
    with pytest.warns(UserWarning, match="no gain of this checkpoint folds"):
        flashnorm.fold_checkpoint(path, tmp_path / "dst", plan=flashnorm.Plan(()))
    assert (tmp_path / "dst" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(("content", "said"), [(POINTER, LFS), (PAGE, SENT), (b"", "is empty")])
@pytest.mark.parametrize("reader", READERS)
def test_field_a_config_that_is_something_else(tmp_path, content, said, reader):
    path = checkpoint(tmp_path)
    (path / "config.json").write_bytes(content)
    with pytest.raises(flashnorm.CheckpointError) as error:
        READERS[reader](path)
    assert f"config.json {said}" in str(error.value)
    with pytest.raises(flashnorm.CheckpointError, match=said.replace("(", "[(]")):
        flashnorm.inspect(path / "config.json")


def test_field_an_index_that_is_a_pointer(tmp_path):
    path = checkpoint(tmp_path, shards=2)
    (path / f"{SINGLE}.index.json").write_bytes(POINTER)
    for name in ("fold", "load"):
        with pytest.raises(flashnorm.CheckpointError, match=f"index.json {LFS}"):
            READERS[name](path)


def test_field_a_tokenizer_that_is_a_pointer(tmp_path):
    path = checkpoint(tmp_path)
    (path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(flashnorm.CheckpointError, match=f"tokenizer.json {LFS}"):
        load_tokenizer(path)
    with pytest.warns(UserWarning, match=f"copied as it was: tokenizer.json {LFS}"):
        fold(path)


def test_field_pickle_files_that_are_pointers(tmp_path):
    path = checkpoint(tmp_path)
    (path / SINGLE).unlink()
    (path / "pytorch_model.bin").write_bytes(POINTER)
    for name in ("fold", "load"):
        with pytest.raises(flashnorm.CheckpointError, match=rf"pytorch_model\.bin {LFS}"):
            READERS[name](path)


@pytest.mark.parametrize(
    ("content", "said"), [(POINTER, LFS), (b"hello" * 99, "does not begin as a GGUF file does")]
)
def test_field_a_gguf_file_that_is_something_else(tmp_path, content, said):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    for name, read in READERS.items():
        with pytest.raises(flashnorm.CheckpointError) as error:
            read(file)
        assert f"model.gguf {said}" in str(error.value), name


def test_field_a_truncated_shard_says_what_to_do(tmp_path):
    path = checkpoint(tmp_path)
    data = (path / SINGLE).read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (path / SINGLE).write_bytes(data[:size])
        with pytest.raises(flashnorm.CheckpointError, match=r"is truncated.*download it again"):
            fold(path)


def test_field_tied_weights_that_are_not_equal_are_refused(tmp_path):
    path = checkpoint(tmp_path, tie_word_embeddings=True)
    words = "ties .* the checkpoint holds both and they differ.*set tie_word_embeddings to false"
    with pytest.raises(flashnorm.CheckpointError, match=words):
        fold(path)
    with pytest.raises(flashnorm.CheckpointError, match=words):
        flashnorm.fold_checkpoint(path, tmp_path / "out", untie=True)
    assert any("they differ" in note for note in flashnorm.inspect(path).notes)
    (path / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match=words) as warned:
        flashnorm.verify(path, path, text="some words", sample=1, tokens=8)
    assert __file__ in {warning.filename for warning in warned if "differ" in str(warning.message)}


def test_field_tied_weights_that_are_equal_are_not_minded(tmp_path):
    path = checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    assert not any("they differ" in note for note in flashnorm.inspect(path).notes)
    fold(path)


def test_field_an_untied_fold_says_so_in_its_config(tmp_path):
    path = checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(path / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(path)
    assert flashnorm.folding(flashnorm.fold_(model, untie=True)).untied
    model.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert any("folded before" in note for note in flashnorm.inspect(tmp_path / "saved").notes)


def test_field_a_strict_fold_says_who_reads_it(tmp_path):
    path = checkpoint(tmp_path)
    left_out = r"left out.*transformers loads it.*llama\.cpp.*vLLM"
    with pytest.warns(UserWarning, match=left_out) as warned:
        flashnorm.fold_checkpoint(path, tmp_path / "strict", strict=True)
    assert {warning.filename for warning in warned} == {__file__}
    mark = json.loads((tmp_path / "strict" / "config.json").read_text())["flashnorm"]
    assert mark["mode"] == "strict"
    assert "vLLM" in mark["left_out"]
    fold(path)
    mark = json.loads((tmp_path / "out" / "config.json").read_text())["flashnorm"]
    assert "left_out" not in mark


def test_field_a_strict_fold_says_so_on_the_command_line(tmp_path):
    path = checkpoint(tmp_path)
    command = [sys.executable, "-m", "flashnorm", "fold", path, tmp_path / "out", "--json"]
    done = subprocess.run([*command, "--strict"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert any(
        line.startswith("warning: ") and "llama.cpp" in line for line in done.stderr.splitlines()
    )
    assert any("llama.cpp" in warning for warning in json.loads(done.stdout)["warnings"])
