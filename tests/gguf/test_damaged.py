"""Files that are damaged or written to do harm: an error that says what, and nothing worse."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashnorm
from flashnorm.errors import CheckpointError, FlashNormError
from flashnorm.gguf import header
from flashnorm.gguf.file import look
from tests.gguf import files
from tests.gguf.files import Q


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return files.model_file(tmp_path_factory.mktemp("good"), "llama", Q.Q4_0)


def refused(path: Path, said: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=said):
        flashnorm.load_gguf(path)


def changed(good: Path, folder: Path, start: int, new: bytes) -> Path:
    data = bytearray(good.read_bytes())
    data[start : start + len(new)] = new
    target = folder / "changed.gguf"
    target.write_bytes(data)
    return target


def place_of(good: Path, name: str) -> int:
    """Where the entry of a tensor has the count of its dimensions."""
    text = name.encode()
    return good.read_bytes().index(struct.pack("<Q", len(text)) + text) + 8 + len(text)


def test_paths(tmp_path):
    refused(tmp_path / "none.gguf", "does not exist", FlashNormError)
    refused(tmp_path, "no config.json and no GGUF file", FlashNormError)
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "is no GGUF file", FlashNormError)
    refused(tmp_path / "config.json", "is a file but no GGUF file", FlashNormError)
    with pytest.raises(FlashNormError, match=r"float32, bfloat16 or float16, not in torch\.int8"):
        flashnorm.load_gguf(tmp_path, torch.int8)


def test_contents_of_another_kind(tmp_path):
    for name, content, said in (
        ("empty", b"", "is empty"),
        ("zeros", b"\0" * 99, "begins with nothing but zeros"),
        ("page", b"<!doctype html>", "is a page that a server sent"),
        ("text", b"GGML....", "does not begin as a GGUF file does"),
        ("short", b"GGUF", "cannot be read as a GGUF file"),
        ("old", b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        ("big", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "bytes are in the other order"),
        ("none", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture"),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        refused(tmp_path / f"{name}.gguf", said)


def test_a_file_that_ends_too_early(good, tmp_path):
    data = good.read_bytes()
    end = header.read(good).end
    for length in (30, 200, end - 5, end + 100, len(data) - 100):
        cut = tmp_path / f"{length}.gguf"
        cut.write_bytes(data[:length])
        refused(cut, "ends in its head|unpack_from|ends before .* does|cannot be read")


def test_a_file_that_is_cut_after_it_was_looked_into(good, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(good.read_bytes())
    file = look(copy)
    copy.write_bytes(good.read_bytes()[: file.tensors[-1].place + 3])
    with pytest.raises(CheckpointError, match="ends in the middle of"):
        file.values(file.tensors[-1])


def test_shapes_and_types_that_cannot_be(good, tmp_path):
    place = place_of(good, "blk.0.ffn_up.weight")
    after = place + 4 + 2 * 8
    for start, new, said in (
        (place, struct.pack("<I", 2**31), "has 2147483648 dimensions"),
        (place, struct.pack("<I", 0), "has 0 dimensions"),
        (place + 4, struct.pack("<Q", 2**63), "is \\[96, 9223372036854775808\\]"),
        (place + 4, struct.pack("<Q", 63), "its rows are no multiple of the 32"),
        (place + 4, struct.pack("<Q", 32), "is \\[96, 32\\], and \\[96, 64\\] by the metadata"),
        (place + 12, struct.pack("<Q", 95), "is \\[95, 64\\], and \\[96, 64\\] by the metadata"),
        (place + 12, struct.pack("<Q", 2**30), "ends before blk.0.ffn_up.weight does"),
        (after, struct.pack("<I", 999), "type 999 of a tensor is none that gguf"),
        (after, struct.pack("<I", Q.I32), "gguf .* cannot decode tensors of type i32"),
        (after, struct.pack("<I", Q.Q8_K), "gguf .* cannot decode tensors of type q8_k"),
        (after + 4, struct.pack("<Q", 2**40), "ends before blk.0.ffn_up.weight does"),
    ):
        refused(changed(good, tmp_path, start, new), said)


def test_two_tensors_of_one_name(good, tmp_path):
    data = good.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")
    (tmp_path / "two.gguf").write_bytes(data)
    refused(tmp_path / "two.gguf", "two tensors have one name")


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q5_1, Q.Q4_1], ids=str)
def test_scales_that_are_no_numbers(kind, scale, tmp_path):
    file = files.model_file(tmp_path, "llama", kind)
    stored = next(s for s in look(file).tensors if s.name == "blk.1.attn_k.weight")
    size = gguf.GGML_QUANT_SIZES[kind][1]
    last = 2 if kind != Q.Q4_0 else 0
    place = stored.place + 3 * size + last
    refused(
        changed(file, tmp_path, place, np.float16(scale).tobytes()),
        "blk.1.attn_k.weight in .* has 1 blocks whose scale is infinite or not a number",
    )


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    file = files.write(
        tmp_path / "a.gguf", "nobody", {}, iter([("token_embd.weight", (64, 64), Q.Q4_0)])
    )
    refused(file, "architecture nobody is not supported")


def test_tensors_that_are_missing(tmp_path):
    file = files.model_file(tmp_path, "llama", without="blk.1.attn_q.weight")
    refused(file, "lacks 1 tensors of its model, the first is model.layers.1.self_attn.q_proj")
    file = files.model_file(tmp_path, "llama", without="token_embd")
    refused(file, "lacks .* tensors of its model")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_head_with_any_byte_changed_is_read_or_refused(good, tmp_path, data):
    content = bytearray(good.read_bytes())
    end = header.read(good).end
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "any.gguf"
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        look(file)


def test_lists_in_lists_are_not_followed(tmp_path):
    """A chain of them would end the stack."""
    pair = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    chain = struct.pack("<IQ", 9, 1) * 100_000
    file = tmp_path / "deep.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair + chain)
    refused(file, "no lists of kind 9")
