"""Tied weights and --untie: whichever name comes first, whoever reads it, and by which name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from tests.errors import relative
from tests.field.test_field_recording import EXACT, WIDTH, X, randomize_

X64 = X.double()
IDS = torch.randint(0, 11, (2, 4), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    inputs = (X64,)

    def __init__(self):
        super().__init__()
        self.parts()
        randomize_(self.double())


class HeadFirst(Model):
    """The head is registered before the embedding whose weight it has."""

    inputs = (IDS,)

    def parts(self):
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.norm, self.embed = nn.RMSNorm(WIDTH, eps=1e-6), nn.Embedding(11, WIDTH)
        self.embed.weight = self.head.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class EmbeddingFirst(HeadFirst):
    def parts(self):
        self.embed = nn.Embedding(11, WIDTH)
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight


class Three(Model):
    """Three layers have one weight, and the norm's reader comes first, second or last."""

    reader = 0

    def parts(self):
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])
        for layer in self.layers[1:]:
            layer.weight = self.layers[0].weight
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(self.norm(x) if number == self.reader else x)
        return x


class ThreeSecond(Three):
    reader = 1


class ThreeLast(Three):
    reader = 2


class Centered(Three):
    """The first is the writer of a LayerNorm as well."""

    def parts(self):
        super().parts()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.layers[2](self.norm(self.layers[0](x)) + self.layers[1](x))


class SharedModule(Model):
    """A layer that is registered twice is one, and its weight is that of another as well."""

    def parts(self):
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again = self.first
        self.other = nn.Linear(WIDTH, WIDTH, bias=False)
        self.other.weight = self.first.weight
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.again(self.norm(self.first(x))) + self.other(x)


class SharedReader(SharedModule):
    def forward(self, x):
        return self.again(self.norm(self.other(x)))


EXACTLY = [HeadFirst, EmbeddingFirst, Three, ThreeSecond, ThreeLast, Centered, SharedReader]


class ReadFromOutside(Three):
    """A function reads the weight of one of them: by which name cannot be told."""

    def forward(self, x):
        return F.linear(self.layers[0](self.norm(x)), self.layers[2].weight)


class WriterFromOutside(Centered):
    def forward(self, x):
        return self.layers[2](self.norm(F.linear(x, self.layers[1].weight)) + self.layers[1](x))


class TwoNames(Model):
    """One module holds it by two names."""

    def parts(self):
        self.first = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.second = self.first
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x):
        return F.linear(F.linear(self.norm(x), self.first), self.second)


REFUSED = [SharedModule, ReadFromOutside, WriterFromOutside, TwoNames]


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("cls", [*EXACTLY, *REFUSED])
def test_field_an_untied_weight_changes_by_itself(cls, center):
    model = cls()
    expected, before = model(*model.inputs), states(model)
    plan = flashnorm.folding(flashnorm.fold_(model, model.inputs, untie=True, center=center))
    assert relative(model(*model.inputs).detach(), expected.detach()) <= EXACT, str(plan)
    if "_flashnorm_undo" in model.__dict__:
        flashnorm.unfold_(model)
    for name, value in states(model).items():
        assert relative(value, before[name]) <= EXACT, name
    assert relative(model(*model.inputs).detach(), expected.detach()) <= EXACT


@pytest.mark.parametrize("cls", EXACTLY)
def test_field_untying_folds_what_a_tie_keeps(cls):
    model = cls()
    assert cls is SharedReader or not flashnorm.inspect(model, model.inputs, center=True).folded
    plan = flashnorm.inspect(model, model.inputs, untie=True, center=cls is Centered)
    assert plan.folded or plan.centerings, str(plan)
    assert plan.untied or cls is SharedReader


@pytest.mark.parametrize("cls", REFUSED)
def test_field_a_tie_whose_names_cannot_be_told_apart_stays(cls):
    plan = flashnorm.inspect(cls(), (X64,), untie=True, center=True)
    assert not plan.folded
    assert not plan.untied


def test_field_tied_models_that_are_copied_fold_alike():
    model = HeadFirst()
    other = copy.deepcopy(model)
    for one in (model, other):
        flashnorm.fold_(one, one.inputs, untie=True)
    assert torch.equal(model(IDS), other(IDS))
