"""Rows that are read from the files of a checkpoint are those that loading all of it would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from flashnorm import CheckpointError, FlashNormError
from flashnorm.checkpoint.disk_rows import DiskTensor, OpenShards, disk_tensor
from flashnorm.checkpoint.provenance import Provenance, ProvenanceTensor
from flashnorm.checkpoint.source import Source, open_source
from flashnorm.checkpoint.values import read_parameter

SHAPES = {"a": (6, 5), "b": (6, 5), "c": (4, 3, 5), "d": (5, 8)}
# What a loader may make of these tensors, and how much of it lies in files as it is read.
MADE: dict[str, Any] = {
    "as it lies": lambda t: t["a"],
    "three axes": lambda t: t["c"],
    "transposed": lambda t: t["d"].T,
    "joined": lambda t: torch.cat([t["a"], t["b"]]),
    "joined side by side": lambda t: torch.cat([t["a"], t["b"]], 1),
    "experts": lambda t: torch.stack([t["a"], t["b"]]),
    "experts of two": lambda t: torch.stack(
        [torch.cat([t["a"], t["b"]]), torch.cat([t["b"], t["a"]])]
    ),
    "experts, transposed": lambda t: torch.stack([t["a"].T, t["b"].T]),
    "cut": lambda t: t["c"][1:3],
    "turned": lambda t: t["c"].permute(1, 0, 2),
    "one axis more": lambda t: t["c"].reshape(2, 2, 3, 5),
    "rotary order": lambda t: t["a"].view(2, 3, 5).transpose(0, 1).reshape(6, 5),
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float64])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).to(request.param) for name, shape in SHAPES.items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return open_source(path)


def provenance(make: Any) -> Provenance:
    tensors = {name: ProvenanceTensor.of(name, shape) for name, shape in SHAPES.items()}
    made: ProvenanceTensor = make(tensors)
    return made.provenance()


def opened(source: Source, make: Any, dtype: torch.dtype | None = None) -> DiskTensor:
    found = provenance(make)
    stored = read_parameter(source, found).dtype
    return disk_tensor(OpenShards(source), found, dtype or stored)


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_every_way_to_read_gives_the_same_numbers(source: Source, make: Any) -> None:
    expected = read_parameter(source, provenance(make))
    tensor = opened(source, make)
    assert tensor.shape == expected.shape
    assert torch.equal(tensor.dequantize(), expected)
    rows = expected.reshape(-1, expected.shape[-1])
    held = tensor.held
    for first in range(len(rows)):
        for stop in range(first, len(rows) + 1):
            assert torch.equal(
                held.rows(slice(first, stop)).dequantized(), rows[first:stop].double()
            )
    which = torch.tensor([3, 0, 0, len(rows) - 1, 2, 3])
    assert torch.equal(held.rows(which).dequantized(), rows[which].double())
    part = held.rows(slice(1, 5)).rows(torch.tensor([2, 1])).rows(slice(1, 2))
    assert torch.equal(part.dequantized(), rows[2:3].double())


@pytest.mark.parametrize("make", [MADE["as it lies"], MADE["joined"], MADE["transposed"]])
def test_operations_compute_what_they_compute_in_memory(source: Source, make: Any) -> None:
    tensor, expected = opened(source, make), read_parameter(source, provenance(make))
    x = torch.randn(4, expected.shape[1]).to(expected.dtype)
    torch.testing.assert_close(F.linear(x, tensor), F.linear(x, expected))
    torch.testing.assert_close(x @ tensor.T, x @ expected.T)
    ids = torch.tensor([[2, 1], [2, 0]])
    assert torch.equal(F.embedding(ids, tensor), F.embedding(ids, expected))
    assert torch.equal(tensor[1] + 0, expected[1])
    assert torch.equal(tensor * 2, expected * 2)


def test_an_expert_is_read_alone(source: Source) -> None:
    tensor = opened(source, MADE["experts"])
    shards = tensor.held.weight.shards
    second = tensor[1]
    assert isinstance(second, DiskTensor)
    assert shards.read_bytes == 0
    x = torch.randn(2, 5).to(tensor.dtype)
    F.linear(x, second)
    assert shards.read_bytes == source.where["b"].entry.nbytes


def test_numbers_are_rounded_as_the_model_loads_them_and_then_once_more(source: Source) -> None:
    tensor, expected = opened(source, MADE["joined"], torch.float16), provenance(MADE["joined"])
    loaded = read_parameter(source, expected).to(torch.float16)
    assert torch.equal(tensor.dequantize(), loaded)
    wide = tensor.to(torch.float64)
    assert isinstance(wide, DiskTensor)
    assert torch.equal(wide.dequantize(), loaded.double())


def test_it_has_no_memory_and_takes_no_writes(source: Source) -> None:
    tensor = opened(source, MADE["as it lies"])
    with pytest.raises(FlashNormError, match="would write into a weight in a file: load the model"):
        tensor.zero_()
    with pytest.raises(FlashNormError, match="would write into a weight in a file"):
        tensor.copy_(torch.zeros(6, 5))
    with pytest.raises(FlashNormError, match="has no plain memory"):
        tensor.data_ptr()
    with pytest.raises(FlashNormError, match="has no gradient"):
        tensor.requires_grad_()


def test_a_file_that_shrinks_is_told(tmp_path: Path) -> None:
    save_file(
        {name: torch.randn(shape) for name, shape in SHAPES.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text("{}")
    tensor = opened(open_source(tmp_path), MADE["as it lies"])
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="the source became shorter while it was being read"):
        tensor.dequantize()
