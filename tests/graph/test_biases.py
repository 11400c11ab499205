"""Norms with a bias: folded into the readers (E2), carried as β/g (E13), or kept for a reason."""

import re

import pytest
import torch

import flashnorm

from . import adversarial_biases as modules
from .test_adversarial import BOUND, inputs_of, made, outputs, relative

# Per module what happens to the bias, and words of the reason where it is not folded.
EXPECTED = {
    modules.Base: ("folded", ""),
    modules.NoSlot: ("carried", "reader.weight has no bias of its own"),
    modules.OneWithoutSlot: ("carried", "other.weight has no bias of its own"),
    modules.Decomposed: ("folded", ""),
    modules.Gated: ("carried", "no bias of its own that could take it"),
    modules.Scaled: ("carried", "no bias of its own that could take it"),
    modules.Masked: ("carried", "no bias of its own that could take it"),
    modules.TokenShift: ("carried", "no bias of its own that could take it"),
    modules.Pooled: ("carried", "no bias of its own that could take it"),
    modules.ScaledProduct: ("carried", "no bias of its own that could take it"),
    modules.HalfBias: ("carried", "no bias of its own that could take it"),
    modules.ReaderBiasShared: ("carried", "the bias reader.bias is tied"),
    modules.ReaderBiasReadElsewhere: ("carried", "the bias reader.bias is also read by sum"),
    modules.ReaderBiasReversed: ("carried", "no bias of its own that could take it"),
    modules.ReaderScaled: ("carried", "no bias of its own that could take it"),
    modules.Packed: ("folded", ""),
    modules.PackedWrongly: ("carried", "no bias of its own that could take it"),
    modules.Transposed: ("folded", ""),
    modules.TwoNorms: ("folded", ""),
    modules.OneWithBias: ("carried", "no bias of its own that could take it"),
    modules.BiasReadElsewhere: ("kept", "its bias norm.bias is also read by"),
    modules.BiasOfTwoNorms: ("kept", "also belongs to other gains"),
    modules.Subtracted: ("kept", "a bias is subtracted"),
    modules.OtherOrder: ("kept", "otherwise than feature by feature"),
    modules.ScaledShift: ("kept", "otherwise than feature by feature"),
    modules.TwoShifts: ("kept", "several biases are added"),
    modules.BeforeAndAfter: ("carried", "no bias of its own that could take it"),
    modules.Residual: ("kept", "also added to another value"),
    modules.Convolved: ("carried", "no bias of its own that could take it"),
}


@pytest.mark.parametrize("cls", EXPECTED, ids=lambda cls: cls.__name__)
def test_bias_goes_where_it_may(cls):
    model, inputs = made(cls), inputs_of(cls)
    state, reason = EXPECTED[cls]
    before = outputs(model, inputs)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    plan = flashnorm.folding(flashnorm.fold_(model, inputs))
    if state == "kept":
        assert not plan.folded
        assert all(re.search(reason, site.reason) for site in plan.sites)
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
        return
    assert len(plan.folded) == len(plan.sites)
    biased = [site for site in plan.sites if site.norm_bias]
    assert {site.bias for site in biased} == {state}
    assert all(re.search(reason, site.bias_reason) for site in biased)
    assert relative(outputs(model, inputs), before) <= BOUND
    for site in biased:
        assert bool((model.get_parameter(site.norm_bias) == 0).all()) == (state == "folded")
    assert not flashnorm.inspect(model, inputs).folded
    assert flashnorm.folding(flashnorm.fold_(model, inputs)) == plan  # there is nothing more
    flashnorm.unfold_(model)
    for name, value in model.state_dict().items():
        assert relative(value, saved[name]) <= BOUND


@pytest.mark.parametrize("cls", [c for c, e in EXPECTED.items() if e[0] == "carried"])
def test_a_bias_that_is_carried_is_really_needed(cls):
    model, inputs = made(cls), inputs_of(cls)
    before = outputs(model, inputs)
    plan = flashnorm.folding(flashnorm.fold_(model, inputs))
    with torch.no_grad():
        for site in plan.folded:
            if site.norm_bias:
                model.get_parameter(site.norm_bias).zero_()
    assert relative(outputs(model, inputs), before) > 1e-3


@pytest.mark.parametrize("cls", [modules.ReaderBiasReversed, modules.Scaled, modules.Gated])
def test_folding_such_a_bias_into_the_reader_would_be_wrong(cls):
    model, inputs = made(cls), inputs_of(cls)
    before = outputs(model, inputs)
    product = model.reader.weight @ model.norm.bias
    with torch.no_grad():
        model.reader.bias += product
        model.norm.bias.zero_()
    assert relative(outputs(model, inputs), before) > 1e-3


def test_a_zero_gain_keeps_a_bias_that_no_reader_can_take():
    model, inputs = made(modules.ZeroGain), inputs_of(modules.ZeroGain)
    with torch.no_grad():
        model.norm.weight[3] = 0.0
    before = outputs(model, inputs)
    (site,) = flashnorm.folding(flashnorm.fold_(model, inputs)).sites
    assert (site.gain_state, site.bias) == ("kept", "kept")
    assert re.search(r"norm\.bias cannot be kept as β/g", site.reason)
    assert torch.equal(outputs(model, inputs), before)


def test_a_zero_gain_stops_no_bias_that_the_reader_takes():
    model, inputs = made(modules.Base), inputs_of(modules.Base)
    with torch.no_grad():
        model.norm.weight[3] = 0.0
    before = outputs(model, inputs)
    (site,) = flashnorm.folding(flashnorm.fold_(model, inputs)).sites
    assert (site.gain_state, site.bias) == ("folded", "folded")
    assert relative(outputs(model, inputs), before) <= BOUND


def test_a_gain_of_one_still_gives_its_bias_away():
    model, inputs = made(modules.Base), inputs_of(modules.Base)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
    before = outputs(model, inputs)
    (site,) = flashnorm.folding(flashnorm.fold_(model, inputs)).sites
    assert (site.gain_state, site.bias) == ("folded", "folded")
    assert relative(outputs(model, inputs), before) <= BOUND


def test_an_overflowing_bias_is_refused_before_anything_is_touched():
    model, inputs = made(modules.Base), inputs_of(modules.Base)
    with torch.no_grad():
        model.reader.bias.fill_(6e4)
        model.norm.bias.fill_(1e4)
        model.reader.weight.fill_(1.0)
    plan = flashnorm.inspect(model, inputs)
    model.half()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(flashnorm.FoldError, match=r"reader\.bias: adding W β to it overflows"):
        flashnorm.rewrite.apply_plan_(model, plan)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
