"""Norms as people write them by hand: every one is a row, and what folds is exact."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from tests.errors import relative, rounding

D, K = 8, 6
BOUND = 1e-12  # float64: a few roundings on eight numbers
SINGLE = rounding(D, 4, torch.float32)  # a norm between two matrices, and a residual


def parameter(*shape):
    return nn.Parameter(1 + 0.3 * torch.randn(*shape))


class Scaled(nn.Module):
    """`F.normalize(x) · √d · g`."""

    def __init__(self):
        super().__init__()
        self.g = parameter(D)

    def forward(self, x):
        return F.normalize(x, dim=-1) * D**0.5 * self.g


class ScaledImages(nn.Module):
    """The same over the channels of images, with a bias, read by a 1×1 convolution."""

    def __init__(self):
        super().__init__()
        self.gamma, self.bias = parameter(D, 1, 1), parameter(D, 1, 1)

    def forward(self, x):
        return F.normalize(x, dim=1) * D**0.5 * self.gamma + self.bias


class Annotated(nn.Module):
    """`g · (x − mean) / (std + ε) + b`, ε outside and n − 1 inside."""

    def __init__(self):
        super().__init__()
        self.a_2, self.b_2 = parameter(D), parameter(D)

    def forward(self, x):
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + 1e-6) + self.b_2


class GainFirst(Scaled):
    def forward(self, x):
        return self.g * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class GainOnScale(Scaled):
    def forward(self, x):
        return x * (self.g * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class VarMean(Annotated):
    def forward(self, x):
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + 1e-6) * self.a_2 + self.b_2


class Squares(Annotated):
    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = (x * x).mean(-1, keepdim=True) - mean * mean
        return (x - mean) / torch.sqrt(var + 1e-6) * self.a_2 + self.b_2


class ShiftedTanh(Annotated):
    def __init__(self):
        super().__init__()
        self.alpha = parameter(1)

    def forward(self, x):
        return torch.tanh((self.alpha + 1) * x) * self.a_2 + self.b_2


class ByMagnitude(Scaled):
    def forward(self, x):
        return self.g * (x / x.abs().mean(-1, keepdim=True))


class ByLargest(Scaled):
    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True).clamp(min=1e-6) * self.g


class InOneOperation(Annotated):
    def forward(self, x):
        return torch.addcmul(self.b_2, F.layer_norm(x, (D,)), self.a_2)


class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, D)
        self.norm.weight, self.norm.bias = parameter(D), parameter(D)

    def forward(self, x):
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.reader = nn.Linear(D, D), norm(), nn.Linear(D, K)

    def forward(self, x):
        return self.reader(self.norm(self.first(x)))


class Images(Model):
    def __init__(self, norm):
        super().__init__(norm)
        self.first, self.reader = nn.Conv2d(D, D, 1), nn.Conv2d(D, K, 1)


ROWS = [Scaled, Annotated, GainFirst, GainOnScale, VarMean, Squares, ShiftedTanh]
ROWS += [ByMagnitude, ByLargest, InOneOperation]


def made(norm):
    torch.manual_seed(0)
    images = norm in (ScaledImages, Groups)
    model = (Images if images else Model)(norm).double().eval()
    shape = (2, D, 3, 5) if images else (2, 5, D)
    return model, torch.randn(shape, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("norm", [*ROWS, ScaledImages, Groups], ids=lambda c: c.__name__)
def test_field_a_norm_written_by_hand_folds(norm):
    model, x = made(norm)
    before = model(x)
    plan = flashnorm.folding(flashnorm.fold_(model, (x,)))
    assert [site.gain_state for site in plan.sites] == ["folded"], str(plan)
    assert relative(model(x), before) <= BOUND
    weight = model.get_parameter(plan.sites[0].gain.parameter)
    assert (weight == plan.sites[0].gain.identity).all()


class Fused(nn.Module):
    """A fused norm, of a gain and a bias that are not simply its module's own parameters."""

    def __init__(self, call):
        super().__init__()
        self.gamma, self.call = parameter(D), call
        self.register_buffer("beta", torch.randn(D))

    def forward(self, x):
        return self.call(x, self.gamma, self.beta)


CALLS = {
    "buffer as bias": lambda x, g, b: F.layer_norm(x, (D,), g, b),
    "buffer added": lambda x, g, b: F.layer_norm(x, (D,), g) + b,
    "gain flipped": lambda x, g, b: F.rms_norm(x, (D,), g.flip(0)),
    "gain rolled": lambda x, g, b: F.layer_norm(x, (D,), torch.cat([g[3:], g[:3]])),
    "gain times buffer": lambda x, g, b: F.rms_norm(x, (D,), g * b),
}


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
def test_field_a_gain_that_is_not_a_whole_parameter_is_not_lost(call):
    torch.manual_seed(0)
    model = Model(lambda: Fused(CALLS[call])).eval()
    x = torch.randn(2, 5, D)
    expected = Model.forward(model.double(), x.double())
    model.float()
    flashnorm.accelerate_(model, (x,))
    for _ in range(3):
        assert relative(model(x).double(), expected) <= SINGLE


@torch.no_grad()
def test_field_a_bias_that_is_no_parameter_is_named_in_the_reason():
    torch.manual_seed(0)
    model, x = Model(lambda: Fused(CALLS["buffer as bias"])).double(), torch.randn(2, 5, D)
    before = model(x.double())
    plan = flashnorm.folding(flashnorm.fold_(model, (x.double(),)))
    assert plan.sites[0].gain_state == "kept"
    assert plan.sites[0].reason.startswith("a tensor that is no parameter is added to it")
    assert relative(model(x.double()), before) == 0
