"""A norm is found by what it computes, folded exactly, and never taken for another one."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from flashnorm.planner import inspect_module
from tests.errors import rounding

from . import spellings
from .spellings import BOUND, KEPT, LOOK_ALIKES, SPELLED, D, blocks, inputs, outcomes, relative


def single(x: torch.Tensor) -> float:
    """What float32 can move a norm of x and the two matrices around it.

    A spelling may subtract mean(x)² from mean(x²), whose rounding errors weigh as much more as
    they are larger than the variance.
    """
    lost = x.square().mean(-1) / x.var(-1, correction=0)
    return rounding(D, 4, torch.float32) * float(lost.max())


@pytest.fixture(scope="module")
def spelled():
    return dict(zip(SPELLED, outcomes(list(SPELLED.values())), strict=True))


@pytest.mark.parametrize("name", SPELLED)
def test_a_spelling_is_found_and_folds_exactly(spelled, name):
    assert spelled[name].error <= BOUND
    reasons = [site.reason for site in spelled[name].sites]
    assert spelled[name].folded, reasons


class WithoutRecording(spellings.Blocks):
    """In inference mode many operations are seen whole: `linear`, `layer_norm`, `einsum`, `to`."""

    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


@torch.no_grad()
def test_all_spellings_fold_in_inference_mode():
    torch.manual_seed(0)
    model, x = WithoutRecording(list(SPELLED.values())).double().eval(), inputs()
    before = model(x)
    plan = flashnorm.folding(flashnorm.fold_(model, (x,)))
    for number, name in enumerate(SPELLED):
        sites = [site for site in plan.sites if site.path == f"norms.{number}"]
        assert any(site.gain_state == "folded" for site in sites), (name, sites)
    for found, expected in zip(model(x), before, strict=True):
        assert relative(found, expected) <= BOUND


def test_there_are_enough_spellings():
    assert len(SPELLED) >= 40


@pytest.fixture(scope="module")
def accelerated():
    """The relative errors, in float32, of the model as it is and of the accelerated one."""
    codes = list(SPELLED.values())
    truth, model = blocks(codes), blocks(codes).float()
    model.load_state_dict(truth.state_dict())
    x = inputs().float()
    with torch.no_grad():
        expected = blocks_in_double(model, truth)(x.double())
        flashnorm.accelerate_(model, (x,))
        calls = [model(x) for _ in range(3)]
    bound = single(model.first(x))
    errors = [[relative(y.double(), e) for y, e in zip(c, expected, strict=True)] for c in calls]
    return bound, dict(zip(SPELLED, zip(*errors, strict=True), strict=True))


def blocks_in_double(model, truth):
    """The model in float64 with the numbers that it has in float32."""
    truth.load_state_dict(model.state_dict())
    return truth


@pytest.mark.parametrize("name", SPELLED)
def test_an_accelerated_spelling_is_exact(accelerated, name):
    bound, errors = accelerated
    assert max(errors[name]) <= bound


@pytest.mark.parametrize("name", KEPT)
def test_a_gain_that_cannot_move_is_a_row_with_its_reason(name):
    code, words = KEPT[name]
    (found,) = outcomes([code])
    assert found.error == 0
    assert not found.folded
    assert any(re.search(words, site.reason) for site in found.sites if site.gain_state == "kept")


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_what_only_looks_like_a_norm_is_no_row(name):
    (found,) = outcomes([LOOK_ALIKES[name]])
    assert found.error == 0
    assert found.sites == ()


def test_random_spellings_are_found_and_none_is_wrong():
    counts = spellings.run(120, seed=1)
    assert counts["wrong"] == 0
    assert spellings.found(counts) >= spellings.LEAST_FOUND


class Swapped(nn.Module):
    """A norm whose `bias` is its gain and whose `weight` is its bias."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = gain(), gain()

    def forward(self, x):
        return F.layer_norm(x, (D,), self.bias, self.weight)


class Unread(Swapped):
    """A norm with a parameter that it does not read."""

    def forward(self, x):
        return F.layer_norm(x, (D,), self.weight)


@torch.no_grad()
@pytest.mark.parametrize("norm", [Swapped, Unread])
def test_a_norm_is_only_replaced_by_one_with_the_same_parameters(norm):
    torch.manual_seed(0)
    model, x = Model(rms).double(), inputs()
    model.norm = norm().double()
    model.reader = nn.Linear(D, D, bias=False).double()
    before = model(x)
    flashnorm.fold_(model, (x,), center=True)
    assert relative(model(x), before) <= BOUND
    assert type(model.norm) is norm


def gain(size=D):
    return nn.Parameter(1 + 0.3 * torch.randn(size))


class Norm(nn.Module):
    """A norm whose forward is `call(self, x)`."""

    def __init__(self, call, shape=(D,)):
        super().__init__()
        self.weight, self.bias, self.call = gain(shape), gain(shape), call
        self.register_buffer("beta", torch.randn(D))
        self.register_buffer("eps", torch.tensor(0.3))

    def forward(self, x):
        return self.call(self, x)


class Model(nn.Module):
    """A residual stream that only linear layers write, a norm that reads it, and its reader."""

    def __init__(self, call, shape=(D,)):
        super().__init__()
        self.first, self.norm = nn.Linear(D, D), Norm(call, shape)
        self.reader = nn.Linear(D, D)

    def forward(self, x):
        return self.reader(self.norm(self.first(x)))


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def centered(x, axis=-1):
    return x - x.mean(axis, keepdim=True)


def misaligned(s, x):
    """On square x the statistic of row j divides column j."""
    return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6).unsqueeze(-2) * s.weight


def over_tokens(s, x):
    return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6) * s.weight


def first_axis(s, x):
    """A layer norm over the channels of [N, C, L], with as many positions as channels."""
    d = centered(x, 1)
    y = d / (d.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    return y * s.weight[:, None] + s.bias[:, None]


# Norms of which the kernels have another one: no module may take their place.
NOT_STANDARD = {
    "misaligned": misaligned,
    "over_tokens": over_tokens,
    "first_axis": first_axis,
    "deviation": lambda s, x: s.weight * centered(x) / (x.std(-1, keepdim=True) + 0.1) + s.bias,
    "eps_outside": lambda s, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 0.3) * s.weight,
    "eps_clamps": lambda s, x: x / x.pow(2).mean(-1, True).sqrt().clamp(min=0.8) * s.weight,
    "eps_buffer": lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.eps) * s.weight,
    "two_eps": lambda s, x: x * (x.pow(2).mean(-1, True) + 0.3 + 0.2).rsqrt() * s.weight,
    "length": lambda s, x: F.normalize(x, dim=-1) * s.weight,
    "scaled_statistic": lambda s, x: x * torch.rsqrt(4 * x.pow(2).mean(-1, True) + 0.3) * s.weight,
    "scaled_output": lambda s, x: 2 * rms(x) * s.weight,
    "flipped": lambda s, x: F.rms_norm(x, (D,), s.weight.flip(0), 1e-6),
    "flipped_product": lambda s, x: rms(x) * s.weight.flip(0),
    "rolled_bias": lambda s, x: F.layer_norm(x, (D,), s.weight, s.bias.flip(0)),
    "buffer_bias": lambda s, x: F.layer_norm(x, (D,), s.weight, s.beta),
    "buffer_bias_alone": lambda s, x: F.layer_norm(x, (D,), None, s.beta),
    "buffer_added": lambda s, x: rms(x) * s.weight + s.beta,
    "buffer_multiplied": lambda s, x: rms(x) * s.beta * s.weight,
    "bias_first": lambda s, x: (rms(x) + s.bias) * s.weight,
    "bias_alone": lambda s, x: rms(x) + s.bias,
    "bias_halved": lambda s, x: torch.add(rms(x) * s.weight, s.bias, alpha=0.5),
    "two_gains": lambda s, x: rms(x) * s.weight * s.bias,
    "two_biases_apart": lambda s, x: (rms(x) * s.weight + s.bias) * 0.5 + s.bias,
    "two_biases": lambda s, x: rms(x) * s.weight + s.bias + s.bias,
    "gain_times_bias": lambda s, x: F.rms_norm(x, (D,), s.weight * s.bias, 1e-6),
    "two_axes": lambda s, x: F.layer_norm(x, x.shape[-2:]) * s.weight,
    "one_norm": lambda s, x: x / x.abs().mean(-1, keepdim=True) * s.weight,
}


@torch.no_grad()
@pytest.mark.parametrize("name", NOT_STANDARD)
@pytest.mark.parametrize(
    "options", [{}, {"center": True}, {"cancel": True, "center": True}], ids=str
)
def test_a_norm_that_is_not_standard_stays_what_it_is(name, options):
    model, x = made(name)
    before = model(x)
    flashnorm.fold_(model, (x,), **options)
    assert relative(model(x), before) <= BOUND
    assert not any(site.replaceable for site in inspect_module(made(name)[0], (x,)).sites)


@torch.no_grad()
@pytest.mark.parametrize("name", NOT_STANDARD)
def test_a_norm_that_is_not_standard_is_not_accelerated(name):
    model, x = made(name)
    model, x = model.float(), x.float()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        flashnorm.accelerate_(model, (x,))
        for _ in range(3):
            assert relative(model(x).double(), expected) <= single(x)


def made(name):
    torch.manual_seed(0)
    model = Model(NOT_STANDARD[name]).double().eval()
    # As many tokens as features: what is over the wrong axis has the right shape.
    return model, torch.randn(D, D, dtype=torch.float64).expand(2, D, D).clone() + torch.randn(
        2, 1, 1, dtype=torch.float64
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda s, x: (
            centered(x) * (x.pow(2).sum(-1, True) / D - x.mean(-1, True) ** 2 + 0.1).rsqrt()
        ),
        lambda s, x: centered(x) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 0.1),
        lambda s, x: x * (x.square().sum(-1, True) * (1 / D) + 0.1) ** -0.5,
        lambda s, x: rms(x, 0.1),
    ],
)
def test_a_norm_that_is_standard_may_be_replaced_however_it_is_spelled(call):
    torch.manual_seed(0)
    model = Model(lambda s, x: call(s, x) * s.weight + s.bias).double()
    (site,) = inspect_module(model, (inputs(),)).sites
    assert site.replaceable
    assert site.eps == pytest.approx(0.1, rel=1e-12)
