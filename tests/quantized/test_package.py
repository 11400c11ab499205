"""A compiled decode step over packed weights: their tensors are its inputs, wherever they lie."""

from __future__ import annotations

import copy

import pytest
import torch
from gguf import GGMLQuantizationType as Q

import flashnorm
from flashnorm.errors import FlashNormError
from flashnorm.kernels import dispatch
from flashnorm.kernels.formats import blocks
from flashnorm.quantized.decoding import decoded, rounded
from flashnorm.quantized.packed_tensor import PackedTensor
from flashnorm.runtime.laid import Embedded
from tests.gguf.files import model_file
from tests.kernels import packed
from tests.quantized.models import ORIGINS
from tests.quantized.test_generate import PROMPT, llama

LENGTH = 32
GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


def gguf_model(directory, kind):
    file = directory / f"llama-{kind.name}.gguf"
    if not file.exists():
        model_file(directory, "llama", kind, head_dim=16).rename(file)
    return flashnorm.load_gguf(file)


MAKE = {
    "torchao int8": lambda directory: ORIGINS["torchao int8"](llama()),
    "bitsandbytes nf4": lambda directory: ORIGINS["bitsandbytes nf4"](llama(torch.bfloat16)),
    "q4_0": lambda directory: gguf_model(directory, Q.Q4_0),
}


def packaged(directory, name):
    """A model that is accelerated, and one like it with a package."""
    made = MAKE[name](directory)
    package = flashnorm.Package(directory / name.replace(" ", "-"), LENGTH)
    return flashnorm.accelerate_(copy.deepcopy(made)), flashnorm.accelerate_(made, package=package)


@pytest.mark.parametrize("name", MAKE)
def test_every_token_is_that_of_the_accelerated_model(directory, name):
    plain, model = packaged(directory, name)
    expected = plain.generate(PROMPT, **GREEDY)
    with dispatch.forbid_fallback():
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    assert not [n for m in model.modules() for n in m._buffers if n.startswith("_flashnorm")]


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_a_table_of_tokens_in_blocks_needs_no_tensor_of_its_own(name):
    """Nothing that decodes a row is a constant, which a package could not hold."""
    weight = packed.block(name, 9, 256, 0)
    table = torch.nn.Module()
    table.register_buffer("values", weight.values)
    table.forward = Embedded(table, name, 256, torch.float32, "values").__call__
    ids = torch.tensor([[3, 8], [0, 3]])
    exported = torch.export.export(table, (ids,), strict=True)
    assert not exported.graph_signature.inputs_to_lifted_tensor_constants
    expected = decoded(weight, torch.float32)[ids]
    assert torch.equal(expected, rounded(weight.dequantized(), torch.float32)[ids])
    assert torch.equal(exported.module()(ids), expected)


def test_weights_that_move_are_read_where_they_are(directory):
    plain, model = packaged(directory, "q4_0")
    for twin in (plain, model):
        for module in twin.modules():
            for parameter in module._parameters.values():
                if isinstance(parameter, PackedTensor):
                    values = parameter.held.values.clone()
                    values[:, 2:] ^= 85  # other levels under the same scales
                    parameter.held = parameter.held._replace(values=values)
    expected = plain.generate(PROMPT, **GREEDY)
    found = model.generate(PROMPT, **GREEDY)
    assert torch.equal(found, expected)
    assert not torch.equal(found, MAKE["q4_0"](directory).generate(PROMPT, **GREEDY))


def test_what_reads_a_packed_weight_by_its_own_code_is_no_package(directory, tmp_path):
    model = gguf_model(directory, Q.Q4_0)
    layer = model.model.layers[1].mlp.down_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight)
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(FlashNormError, match=r"layers\.1\.mlp\.down_proj.* by its own code"):
        flashnorm.accelerate_(model, package=tmp_path)
    assert [dict(vars(m)) for m in model.modules()] == before
