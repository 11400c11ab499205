"""Dynamic Tanh in the place of norms, as the published recipe has it: folded exactly (E6)."""

import copy

import pytest
import torch
from torch import nn

import flashnorm
from tests.zoo import randomize_
from tests.zoo.fold import outputs, relative, specimen

EXACT = 1e-12


class PublishedDyT(nn.Module):
    """The module of the paper, written once more here so that ours is not held against itself."""

    def __init__(self, width, alpha=0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1) * alpha)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class Derf(PublishedDyT):
    """Another function, and a shift before it."""

    def __init__(self, width):
        super().__init__(width)
        self.s = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.weight * torch.erf(self.alpha * x + self.s) + self.bias


KINDS = [flashnorm.nn.DyT, PublishedDyT, Derf]


def with_dyt(name, kind):
    """The tiny model `name` with every norm swapped for DyT, and random parameters."""
    model, inputs = specimen(name)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, kind(len(module.weight)))
    model = model.float()
    randomize_(model, 0)
    return model.double(), inputs


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("name", "bias"), [("llama", "carried"), ("vit", "folded")])
def test_every_gain_and_bias_moves(name, bias, kind):
    model, inputs = with_dyt(name, kind)
    before = outputs(model, inputs)
    alphas = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("alpha")}
    plan = flashnorm.folding(flashnorm.fold_(model, copy.deepcopy(inputs)))
    assert len(plan.sites) == len(alphas) == 5
    assert {(s.kind, s.gain_state, s.bias) for s in plan.sites} == {("dyt", "folded", bias)}
    assert relative(outputs(model, inputs), before) <= EXACT
    state = model.state_dict()
    assert all(torch.equal(state[name], alpha) for name, alpha in alphas.items())
    for site in plan.sites:
        norm = model.get_submodule(site.path)
        assert (norm.weight == 1).all()
        assert bool((norm.bias == 0).all()) == (bias == "folded")
    flashnorm.unfold_(model)
    assert relative(outputs(model, inputs), before) <= EXACT


def test_ours_is_the_published_one():
    ours, theirs = flashnorm.nn.DyT(16), PublishedDyT(16)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(ours(x), theirs(x))
    assert flashnorm.nn.DyT(16, bias=False).bias is None


def test_a_gate_by_a_sigmoid_is_no_norm():
    class Swish(nn.Module):
        def __init__(self):
            super().__init__()
            self.beta, self.reader = nn.Parameter(torch.ones(1)), nn.Linear(8, 4)

        def forward(self, x):
            return self.reader(x * torch.sigmoid(self.beta * x))

    assert not flashnorm.inspect(Swish(), torch.randn(2, 8)).sites
