"""E2, E13 and E3 while streaming: biases of norms, and centered writers, by plans made by hand."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import flashnorm
from flashnorm import CheckpointError, FoldError, algebra, fold_checkpoint
from flashnorm.checkpoint import blocks
from flashnorm.plan import Centering, Consumer, Entry, Gain, Plan, Site, Span
from tests.zoo import tiny_inputs, tiny_model
from tests.zoo.fold import outputs, relative

from .helpers import load, write_checkpoint

N, K, VOCAB = 48, 40, 29
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ALL = (Span(0, 0, N),)
pytestmark = pytest.mark.filterwarnings("ignore:.*became subnormal")


def site(name, readers, *, bias="none", offset=0.0):
    weight, norm_bias = Gain(f"{name}.weight", offset), "" if bias == "none" else f"{name}.bias"
    return Site(
        name, "layer", N, 1e-6, "folded", "", readers, weight, bias=bias, norm_bias=norm_bias
    )


def layer_plan(offset=0.0, centered=True):
    """`norm` into a linear and a transposed one, its bias too; `post` keeps β/g; `sub` into `d`."""
    wide = Consumer("a.weight", 1, ALL, "a.bias")
    tall = Consumer("b.weight", 0, (Span(0, 16, 32), Span(32, 0, 16)), "b.bias")
    writers = (("d.weight", 0), ("d.bias", 0), ("e.weight", 1), ("a.bias", 0), ("t.weight", 1))
    return Plan(
        (
            site("norm", (wide, tall), bias="folded", offset=offset),
            site("post", (Consumer("c.weight", 1, ALL),), bias="carried", offset=offset),
            site("sub", (Consumer("d.weight", 1, ALL), Consumer("t.weight", 2, ALL))),
        ),
        centerings=tuple(Centering(*writer) for writer in writers) if centered else (),
    )


def layer_tensors(dtype, offset=0.0):
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=rng) * 0.3

    shapes = {"a": (K, N), "b": (N, K), "c": (K, N), "d": (N, N), "e": (VOCAB, N), "t": (3, K, N)}
    found = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    found |= {"a.bias": random(K), "b.bias": random(K), "d.bias": random(N)}
    for name in ("norm", "post", "sub"):
        found |= {f"{name}.weight": 1 - offset + random(N), f"{name}.bias": random(N)}
    found["post.bias"][3] = 0
    return {key: value.to(dtype) for key, value in found.items()}


def expected(tensors, plan):
    """Whole tensors through the algebra: E2, E13, E1, then E3, each rounded once."""
    after = {key: value.clone() for key, value in tensors.items()}
    for name, pairs in plan.bias_absorptions().items():
        products = [
            algebra.bias_product(tensors[c.parameter], tensors[s.parameter], c.axis, c.spans)
            for s, c in pairs
        ]
        algebra.fold_bias_(after[name], sum(products[1:], products[0]))
    gains = {g: algebra.effective_gain(tensors[g.parameter], g) for g in plan.gains()}
    for norm_bias in plan.norm_biases():
        if norm_bias.folded:
            after[norm_bias.parameter].zero_()
        else:
            algebra.carry_bias_(after[norm_bias.parameter], gains[norm_bias.gain])
    for name, pairs in plan.absorptions().items():
        for gain, consumer in pairs:
            algebra.fold_gain_(after[name], gains[gain], consumer.axis, consumer.spans)
    for gain in plan.gains():
        algebra.identity_gain_(after[gain.parameter], gain)
    for centering in plan.centerings:
        algebra.center_(after[centering.parameter], centering.axis)
    return after


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.fixture(params=[1 << 9, 1 << 22], ids=["small blocks", "one block"])
def block_sizes(request, monkeypatch):
    monkeypatch.setattr(algebra, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(blocks, "FOLD_BYTES", request.param)


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shards", [1, 3])
def test_disk_equals_memory(tmp_path, dtype, offset, shards):
    tensors, plan = layer_tensors(dtype, offset), layer_plan(offset)
    src = write_checkpoint(tmp_path / "src", tensors, shards=shards)
    fold_checkpoint(src, tmp_path / "dst", plan=plan)
    found, wanted = load(tmp_path / "dst"), expected(tensors, plan)
    assert_same(found, wanted)


def test_the_function_stays_in_float64(tmp_path):
    """z·g + β into linear layers, from the files alone; and what is written has no mean."""
    before, plan = layer_tensors(torch.float64), layer_plan(centered=False)
    src = write_checkpoint(tmp_path / "src", before)
    fold_checkpoint(src, tmp_path / "dst", plan=plan)
    after = load(tmp_path / "dst")
    z = torch.randn(7, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for norm, weight, bias in (("norm", "a", "a.bias"), ("post", "c", None)):
        y = [
            (z * part[f"{norm}.weight"] + part[f"{norm}.bias"]) @ part[f"{weight}.weight"].T
            + (part[bias] if bias else 0)
            for part in (before, after)
        ]
        torch.testing.assert_close(y[1], y[0], rtol=0, atol=4 * N * 2.0**-52)
    assert not after["norm.bias"].any()
    fold_checkpoint(src, tmp_path / "centered", plan=layer_plan())
    centered = load(tmp_path / "centered")
    for name, axis in (("d.weight", 0), ("d.bias", 0), ("e.weight", 1), ("t.weight", 1)):
        assert float(centered[name].mean(axis).abs().max()) < N * 2.0**-52
        assert float(after[name].mean(axis).abs().max()) > 1e-3


@pytest.mark.parametrize("shards", [1, 3])
def test_strict_removes_a_folded_bias_and_keeps_a_carried_one(tmp_path, shards):
    tensors, plan = layer_tensors(torch.bfloat16), layer_plan()
    src = write_checkpoint(tmp_path / "src", tensors, shards=shards)
    fold_checkpoint(src, tmp_path / "dst", plan=plan, strict=True)
    gone = {"norm.weight", "norm.bias", "post.weight", "sub.weight"}
    wanted = {k: v for k, v in expected(tensors, plan).items() if k not in gone}
    assert_same(load(tmp_path / "dst"), wanted)


def test_centering_alone_is_a_change(tmp_path):
    tensors = layer_tensors(torch.float32)
    src = write_checkpoint(tmp_path / "src", tensors)
    plan = Plan((), centerings=layer_plan().centerings)
    fold_checkpoint(src, tmp_path / "dst", plan=plan)
    assert_same(load(tmp_path / "dst"), expected(tensors, plan))
    assert "flashnorm" in json.loads((tmp_path / "dst" / "config.json").read_text())


def refused(src, match, plan, error=CheckpointError):
    with pytest.raises(error, match=match):
        fold_checkpoint(src, src.parent / "dst", plan=plan)
    assert [path.name for path in src.parent.iterdir()] == [src.name]


def test_a_gain_of_zero_cannot_carry_a_bias(tmp_path):
    tensors = layer_tensors(torch.float32)
    tensors["post.weight"][5] = 0
    src = write_checkpoint(tmp_path / "src", tensors)
    refused(
        src,
        r"post\.bias: β/g is not finite, because the gain post\.weight",
        layer_plan(),
        FoldError,
    )


def test_a_gain_of_zero_carries_a_bias_of_zero(tmp_path):
    tensors = layer_tensors(torch.float32)
    tensors["post.weight"][3] = 0  # where the bias is zero too
    src = write_checkpoint(tmp_path / "src", tensors)
    fold_checkpoint(src, tmp_path / "dst", plan=layer_plan())
    assert_same(load(tmp_path / "dst"), expected(tensors, layer_plan()))


def test_a_quotient_beyond_fp16(tmp_path):
    tensors = layer_tensors(torch.float16)
    tensors["post.weight"][5] = 1e-6
    tensors["post.bias"][5] = 1
    src = write_checkpoint(tmp_path / "src", tensors)
    refused(src, r"post\.bias: β/g is not finite", layer_plan(), FoldError)


def test_a_bias_beyond_fp16(tmp_path):
    tensors = layer_tensors(torch.float16)
    tensors["norm.bias"].fill_(6e4)
    src = write_checkpoint(tmp_path / "src", tensors)
    refused(src, r"[ab]\.bias: adding W β to it overflows torch\.float16", layer_plan(), FoldError)


def test_what_cannot_be_stored_is_said(tmp_path):
    src = write_checkpoint(tmp_path / "src", layer_tensors(torch.float32))
    plan = replace(layer_plan(), entries=(Entry("embed"),))
    with pytest.warns(UserWarning, match="enters embed is not centered.*still need their mean"):
        fold_checkpoint(src, tmp_path / "dst", plan=plan)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom"])
def test_a_layer_norm_model_is_centered_on_disk_as_in_memory(name, tmp_path):
    """The stock class goes on subtracting a mean, of what has none: the same function."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "src")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what of bloom cannot be stored
        plan = fold_checkpoint(tmp_path / "src", tmp_path / "dst", untie=True, center=True)
    assert {(s.gain_state, s.centering) for s in plan.sites} <= {
        ("folded", "folded"),
        ("kept", "folded"),
    }
    stock, live = (AutoModelForCausalLM.from_pretrained(tmp_path / d) for d in ("dst", "src"))
    flashnorm.fold_(live, untie=True, center=True)
    memory, disk = live.state_dict(), stock.state_dict()
    assert all(torch.equal(disk[key], memory[key]) for key in disk)
    inputs = tiny_inputs(model)
    before, after = outputs(model.double(), inputs), outputs(stock.double(), inputs)
    # Two roundings to float32 in each of the eight weights on the way to a logit.
    assert relative(after, before) < 16 * 2.0**-24


# --- through the conversions of a real model ---------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def mixtral(tmp_path):
    pytest.importorskip("transformers")
    from tests.zoo import tiny_model

    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "src")
    return model, tmp_path / "src"


def test_experts_that_are_stored_one_by_one_are_centered(mixtral):
    """The writer [E, n, I] of the model is E tensors [n, I]."""
    model, src = mixtral
    plan = replace(flashnorm.inspect(src), centerings=(Centering(f"{EXPERTS}.down_proj", 1),))
    fold_checkpoint(src, src.parent / "dst", plan=plan)
    wanted = model.state_dict()[f"{EXPERTS}.down_proj"].clone()
    algebra.center_(wanted, 1)
    again = type(model).from_pretrained(src.parent / "dst", dtype="auto")
    assert torch.equal(again.state_dict()[f"{EXPERTS}.down_proj"], wanted)
    assert not torch.equal(model.state_dict()[f"{EXPERTS}.down_proj"], wanted)


def test_a_mean_over_several_tensors_is_refused(mixtral):
    """Gate and up are one parameter of the model and two tensors of the checkpoint."""
    _, src = mixtral
    plan = replace(flashnorm.inspect(src), centerings=(Centering(f"{EXPERTS}.gate_up_proj", 1),))
    refused(src, r"gate_up_proj is centered over features that the checkpoint does not hold", plan)
