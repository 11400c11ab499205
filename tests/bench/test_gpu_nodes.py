"""Kernels per layer of decode graphs, lowered for a GPU that is not there."""

import pytest
import torch

from benchmarks.gpu.lowering import code_for
from benchmarks.gpu.nodes import ATTENTION, MODELS, OTHERS, OURS, WAYS, _called, layer

WITH = WAYS[2]


def words(found):
    """What the compiler's own kernels are fused of, with how often they are called."""
    names = {name: count for name, count in found.kernels.items() if name.startswith("triton")}
    return {frozenset(name.split("_")): count for name, count in names.items()}


def test_a_layer_of_a_decode_graph_has_no_norm_and_no_sum_of_its_own():
    """8 kernels: nothing copies keys, values or a mask, and the counts of all layers are one."""
    found = layer(MODELS["Llama"], WITH)
    assert (found.count(OURS), found.count(ATTENTION)) == (4, 1)
    assert not any({"rsqrt"} & kernel for kernel in words(found))
    assert not any({"clone", "expand", "le"} & kernel for kernel in words(found))
    # RoPE of q, RoPE and cache of k, cache of v.
    assert found.count(OTHERS) == 3
    assert found.total == 8
    assert "triton_poi_fused_add" not in found.kernels


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sums", "more"), [("Qwen3", 2, 6), ("GPT-NeoX", 1, 0)])
def test_the_pass_saves_the_sums_and_kernels_the_rest(name, sums, more):
    original, without, found = (layer(MODELS[name], way) for way in WAYS)
    assert without.total - found.total == sums + 1  # and the count of a layer's tokens
    assert original.total - without.total == more
    assert found.count(OURS) == 4


@pytest.mark.slow
def test_a_dynamic_tanh_is_in_the_products_like_another_norm():
    """A layer has as many kernels as with RMSNorm."""
    plain, found = (layer(MODELS[name], WITH) for name in ("Llama", "DyT Llama"))
    assert found.count(OURS) == 4
    assert not any("tanh" in kernel for kernel in words(found))
    assert found.kernels == plain.kernels


@pytest.mark.slow
def test_small_kernels_can_be_combined():
    assert layer(MODELS["Llama"], WITH, combo_kernels=True).total == 6


def test_what_is_lowered_is_for_a_gpu_and_the_process_stays_without_one():
    code = code_for(lambda x: torch.nn.functional.gelu(x).sum(-1), torch.ones(64, 64))
    assert "device='cuda'" in code or "cuda:0" in code
    assert sum(_called(code).values()) == 1
    assert not torch.cuda.is_available()
