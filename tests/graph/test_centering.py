"""LayerNorms freed of their mean (E3): exact, or refused for the right reason."""

import copy
import re

import pytest
import torch

import flashnorm
from flashnorm.graph.recording import record
from tests.zoo.fold import outputs as true_outputs
from tests.zoo.fold import relative as true_relative
from tests.zoo.fold import specimen

from . import adversarial_streams as modules
from .test_adversarial import BOUND, inputs_of, made, outputs, relative

EXACT = 1e-12
CENTERED = ""
EXPECTED = {
    modules.Base: CENTERED,
    modules.RawReader: "read without a norm by addmm",
    modules.Returned: "the model returns what it writes",
    modules.ReadByAnRms: "also read by",
    modules.InputAdded: "not written by linear layers alone .*input of the model|add in",
    modules.FactorPerFeature: "multiplied feature by feature",
    modules.FactorPerRow: CENTERED,
    modules.GroupedConvolution: "no linear layer writes",
    modules.Convolution: CENTERED,
    modules.Activation: "also read by gelu",
    modules.Constant: "a number is added",
    modules.Positions: CENTERED,
    modules.WriterReadElsewhere: "first.weight is also read by sum",
    modules.WriterUsedTwice: "read without a norm by addmm",
    modules.WriterWithinTheStream: CENTERED,
    modules.Half: "a part of what it writes is read by itself",
    modules.Halves: "a part of what it writes is read by itself",
    modules.SwappedHalves: "a part of what it writes is read by itself",
    modules.Shuffled: CENTERED,
    modules.Crossed: "added to a value that no linear layer writes|not written by linear",
    modules.Experts: CENTERED,
    modules.Spelled: CENTERED,
    modules.MeanReadElsewhere: "statistic is also read by",
    modules.Unbiased: CENTERED,
    modules.EpsilonOutside: CENTERED,
    modules.StridedInput: CENTERED,
    modules.NormWithAnOption: CENTERED,
    modules.NonlinearEntry: CENTERED,
    modules.EntryReadElsewhere: CENTERED,
}
# Centered, but their module is no RMSNorm even so.
NOT_SWAPPED = (
    modules.Spelled,
    modules.Unbiased,
    modules.EpsilonOutside,
    modules.NormWithAnOption,
)


def kinds_of(model, inputs):
    return {site.kind for site in flashnorm.inspect(model, copy.deepcopy(inputs)).sites}


def means(graph):
    """Means of anything but squares."""
    return [n for n in graph.nodes if n.op == "mean" and _before(graph, n).op not in ("pow", "mul")]


def _before(graph, node):
    return graph.producer(node.inputs[0])


@pytest.mark.parametrize("cls", EXPECTED, ids=lambda cls: cls.__name__)
def test_is_centered_exactly_or_refused_for_the_right_reason(cls):
    model, inputs = made(cls), inputs_of(cls)
    before = outputs(model, inputs)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    plan = flashnorm.folding(flashnorm.fold_(model, inputs, center=True))
    layers = [site for site in plan.sites if site.kind == "layer"]
    assert relative(outputs(model, inputs), before) <= BOUND
    if reason := EXPECTED[cls]:
        assert [site.centering for site in layers] == ["kept"] * len(layers)
        assert re.search(reason, layers[0].centering_reason), layers[0].centering_reason
        assert not plan.centerings
        return
    assert {site.centering for site in layers} == {"folded"}
    assert kinds_of(model, inputs) == ({"layer"} if cls in NOT_SWAPPED else {"rms"})
    for writer in plan.centerings:
        value = model.get_parameter(writer.parameter)
        assert value.mean(writer.axis).abs().max() <= 1e-15
    assert set(model.state_dict()) == set(saved)
    flashnorm.unfold_(model)
    assert kinds_of(model, inputs) == {"layer"}
    for name, value in model.state_dict().items():
        assert relative(value, saved[name]) <= BOUND
    assert relative(outputs(model, inputs), before) <= BOUND


# Refused although it would be exact: every feature of the stream is there, but not seen to be.
UNSEEN = (modules.Crossed, modules.SwappedHalves)
REFUSED = [cls for cls, reason in EXPECTED.items() if reason and cls not in UNSEEN]


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_a_refused_centering_would_change_the_outputs(cls):
    """Center the writers, and let the norm take the mean for granted, against all reasons."""
    model, inputs = made(cls), inputs_of(cls)
    before = outputs(model, inputs)
    with torch.no_grad():
        for writer in (model.first, model.second):
            for parameter in writer.parameters():
                flashnorm.algebra.center_(parameter, 0)
    if isinstance(model.norm, torch.nn.LayerNorm):
        _swap(model)
    assert relative(outputs(model, inputs), before) > 1e-3


def _swap(model):
    old = model.norm
    model.norm = flashnorm.nn.FlashRMSNorm(8, old.eps, weight=old.weight, bias=old.bias)


def test_an_rms_model_has_nothing_to_center():
    model, inputs = made(modules.ReadByANormAlready), inputs_of(modules.ReadByANormAlready)
    plan = flashnorm.inspect(model, inputs, center=True)
    assert [site.centering for site in plan.sites] == ["none"]
    assert not plan.centerings


def test_a_long_stream_pays_for_an_entry():
    model, inputs = made(modules.NonlinearEntry), inputs_of(modules.NonlinearEntry)
    plan = flashnorm.inspect(model, inputs, center=True)
    assert [entry.path for entry in plan.entries] == ["blocks.0"]
    assert plan.entries[0].received


# The whole model, not its decoder alone, which is what the causal-LM type of that name is.
TYPES = ["gpt2", "opt", "gpt_neox", "bloom", "falcon", "mpt", "whisper-whole", "vit"]
ENTRIES = {
    "bloom": ["transformer.word_embeddings_layernorm"],
    "whisper-whole": ["model.encoder.layers.0"],
}


@pytest.mark.parametrize("name", TYPES)
def test_a_layer_norm_model_becomes_an_rms_norm_model(name):
    model, inputs = specimen(name)
    before = true_outputs(model, inputs)
    keys = set(model.state_dict())
    plan = flashnorm.folding(flashnorm.fold_(model, copy.deepcopy(inputs), untie=True, center=True))
    assert {(site.kind, site.centering) for site in plan.sites} == {("layer", "folded")}
    assert [entry.path for entry in plan.entries] == ENTRIES.get(name, [])
    graph = record(model, copy.deepcopy(inputs))
    assert kinds_of(model, inputs) == {"rms"}
    assert not means(graph)
    assert not any(node.op in ("native_layer_norm", "var", "var_mean") for node in graph.nodes)
    assert true_relative(true_outputs(model, inputs), before) <= EXACT
    assert keys <= set(model.state_dict())
    flashnorm.unfold_(model)
    assert true_relative(true_outputs(model, inputs), before) <= EXACT


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_tied_head_keeps_the_mean_unless_it_is_untied(name):
    model, inputs = specimen(name)
    plan = flashnorm.inspect(model, inputs, center=True)
    assert {site.centering for site in plan.sites} == {"kept"}
    assert all("is tied to" in site.centering_reason for site in plan.sites)
    assert all("--untie" in site.centering_reason for site in plan.sites)


def test_the_centered_state_dict_loads_into_the_stock_model():
    """Gains of one, biases and centered writers under the names that the original has."""
    model, inputs = specimen("gpt_neox")
    stock = copy.deepcopy(model)
    before = true_outputs(model, inputs)
    flashnorm.fold_(model, copy.deepcopy(inputs), center=True)
    stock.load_state_dict(model.state_dict())
    assert true_relative(true_outputs(stock, inputs), before) <= EXACT
