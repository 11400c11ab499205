"""The length of a header is a number: what its bytes spell says nothing about the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from flashnorm.checkpoint.header import read_header
from flashnorm.content import why_damaged

# As the first bytes of a pickle of torch, of gzip, of zip, and of a page.
LENGTHS = [0x0280, 0x0380, 0x8B1F, 0x685A42, 0x04034B50, 0x0D0A3C]


def written(file: Path, length: int) -> Path:
    tensors = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header = json.dumps(tensors).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", length) + header + bytes(8))
    return file


@pytest.mark.parametrize("length", LENGTHS, ids=hex)
def test_a_header_of_this_length_is_read(tmp_path: Path, length: int) -> None:
    file = written(tmp_path / "model.safetensors", length)
    assert why_damaged(file) == ""
    assert [entry.name for entry in read_header(file).entries] == ["a"]


def test_a_pickle_is_still_told(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.")
    assert "is a pickle file of torch" in why_damaged(file)
    assert why_damaged(written(tmp_path / "model.bin", 0x0280)) == ""
