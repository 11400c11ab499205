"""Every adversarial module: folded exactly, or refused for the right reason, nothing else."""

import re

import pytest
import torch

import flashnorm
from flashnorm.planner import inspect_module
from tests.errors import relative
from tests.forcing import force_

from .adversarial import Base, K, N, TiedEmbedding
from .expectations import EXPECTED

# Folded and original differ by rounding only: 2⁻⁵² times a few operations on eight numbers.
BOUND = 1e-14


def made(cls):
    torch.manual_seed(0)
    model = cls().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # Never ones, zeros or a single number: these hide every bug there is.
            parameter.add_(0.3 * noise) if parameter.ndim < 2 else parameter.copy_(noise)
    return model


def inputs_of(cls):
    torch.manual_seed(1)
    if cls is TiedEmbedding:
        return (torch.randint(K, (2, 5)),)
    return (torch.randn(2, 5, N, dtype=torch.float64),)


def outputs(model, inputs):
    with torch.no_grad():
        out = model(*inputs)
    return torch.cat([o.flatten() for o in out]) if isinstance(out, tuple) else out.flatten()


@pytest.mark.parametrize("cls", EXPECTED, ids=lambda cls: cls.__name__)
def test_is_folded_exactly_or_refused_for_the_right_reason(cls):
    model, inputs = made(cls), inputs_of(cls)
    before = outputs(model, inputs)
    plan = flashnorm.folding(flashnorm.fold_(model, inputs))
    found = {s.gain.parameter: s for s in plan.sites if s.gain}
    for name, reason in EXPECTED[cls].items():
        if name in found:
            assert bool(found[name].gain_state == "folded") == (reason == ""), found[name].reason
            assert re.search(reason, found[name].reason), found[name].reason
        else:
            assert any(re.search(reason, s.reason) for s in plan.sites if s.gain_state == "kept")
    assert set(found) <= set(EXPECTED[cls])
    assert relative(outputs(model, inputs), before) <= BOUND
    parameters = dict(model.named_parameters())
    for site in plan.folded:
        value = parameters[site.gain.parameter]
        assert (value == site.gain.identity).all()


@pytest.mark.parametrize(
    "cls", [c for c, e in EXPECTED.items() if any(e.values())], ids=lambda cls: cls.__name__
)
def test_a_refused_fold_would_change_the_outputs(cls):
    model, inputs = made(cls), inputs_of(cls)
    if cls.__name__ == "ColdExpert":
        inputs = (*inputs, 1)
        seen = inputs[:1]
    else:
        seen = inputs
    before = outputs(model, inputs)
    refused = [name for name, reason in EXPECTED[cls].items() if reason]
    force_(model, seen, refused)
    assert relative(outputs(model, inputs), before) > 1e-3


def test_a_second_fold_changes_nothing():
    model, inputs = made(Base), inputs_of(Base)
    model.forward = lambda x: model.reader(model.norm(x))
    assert flashnorm.folding(flashnorm.fold_(model, inputs)).folded
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    flashnorm.fold_(model, inputs)
    second = flashnorm.inspect(model, inputs)
    assert [s.gain_state for s in second.sites] == ["none"]
    assert "one everywhere already" in second.sites[0].reason
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_tied_head_folds_once_it_has_a_weight_of_its_own():
    model, inputs = made(TiedEmbedding), inputs_of(TiedEmbedding)
    before = outputs(model, inputs)
    embedding = model.embed.weight.detach().clone()
    plan = flashnorm.folding(flashnorm.fold_(model, inputs, untie=True))
    assert plan.untied == (("head.weight", "embed.weight"),)
    assert model.head.weight is not model.embed.weight
    assert torch.equal(model.embed.weight, embedding)
    assert relative(outputs(model, inputs), before) <= BOUND
    flashnorm.unfold_(model)
    assert model.head.weight is model.embed.weight


def test_tracing_leaves_the_model_as_it_was():
    model, inputs = made(Base), inputs_of(Base)
    model.forward = lambda x: model.reader(model.norm(x))
    model.train()
    tensors = dict(model.named_parameters())
    inspect_module(model, inputs)
    assert model.training
    assert all(tensors[name] is p for name, p in model.named_parameters())
