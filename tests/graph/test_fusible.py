"""Which modules count as linear, gated, or readers of a norm: by what they do, to the letter."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from flashnorm.graph.affine import NOT_ALONE, NOT_DYNAMIC, Normed
from flashnorm.graph.fusible import Gated, Linear, Rows, find_fusible
from flashnorm.graph.recording import record
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.nn import FlashRMSNorm
from flashnorm.verification.bounds import CONFIDENCE, unit_roundoff

N, M = 24, 40


class Norm(FlashRMSNorm):
    def __init__(self):
        super().__init__(N, weight=nn.Parameter(torch.randn(N)), offset=1.0)


class Glu(nn.Module):
    """down(silu(gate(x)) ⊙ up(x))"""

    def __init__(self, bias=False):
        super().__init__()
        self.gate, self.up = nn.Linear(N, M, bias=bias), nn.Linear(N, M, bias=bias)
        self.down = nn.Linear(M, N, bias=bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class UpFirst(Glu):
    def forward(self, x):
        return self.down(self.up(x) * F.gelu(self.gate(x), approximate="tanh"))


class OneWeight(nn.Module):
    """Gate and up as halves of one weight, up before gate."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(N, 2 * M), nn.Linear(M, N, bias=False)

    def forward(self, x):
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(up * F.relu(gate))


class Sliced(OneWeight):
    def forward(self, x):
        both = self.both(x)
        return self.down(F.gelu(both[..., :M]) * both[..., M:])


class Scaled(Glu):
    def forward(self, x):
        return self.down(F.silu(2 * self.gate(x)) * self.up(x))


class TwoInputs(Glu):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x + 1))


class AddsItself(Glu):
    def forward(self, x):
        return x + super().forward(x)


class Tanh(Glu):
    def forward(self, x):
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


class Thrice(Glu):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x) * self.up(x))


class InOut(nn.Module):
    """x W for a square W: the shapes are those of x Wᵀ."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, N))

    def forward(self, x):
        return x @ self.weight


class Flipped(InOut):
    def forward(self, x):
        return x @ self.weight.flip(0)


class NotAlways(nn.Module):
    """Its part is `x Wᵀ` for two rows and something else for one."""

    class Part(InOut):
        def forward(self, x):
            return F.linear(x, self.weight) if len(x) > 1 else F.linear(x, self.weight) + 1

    def __init__(self):
        super().__init__()
        self.part = self.Part()

    def forward(self, x):
        return self.part(x) + self.part(x[:1])


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * N, N))

    def forward(self, x):
        return F.linear(x, self.weight[:N])


class More(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Within(nn.Linear):
    def forward(self, x):
        return super().forward(x - 1)


class Before(nn.Module):
    """A module behind a norm."""

    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = Norm(), inner

    def forward(self, x):
        return self.inner(self.norm(x))


def random_(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.eval()


def exactly(module, x):
    """(the outputs in float64, how far from them float32 may lead).

    A sum of n products is off by λ √n u at most (tests/kernels/bounds.py). That moves what follows
    no more than as large a change of every parameter and input does: the most of a few draws.
    """
    wide, size = copy.deepcopy(module).double(), CONFIDENCE * M**0.5 * unit_roundoff(torch.float32)
    truth = wide(x.double())
    moved = []
    for _ in range(8):
        other = copy.deepcopy(wide)
        for parameter in other.parameters():
            parameter.mul_(1 + size * signs(parameter))
        moved.append(other(x.double() * (1 + size * signs(x))) - truth)
    return truth, float(torch.stack(moved).abs().max())


def signs(like):
    return torch.randint(0, 2, like.shape).double() * 2 - 1


def check(module):
    """It runs accelerated as it did, in the second call and in the third."""
    random_(module)
    if not cpu.available()[0]:
        pytest.skip("no compiled kernels here")
    model, x = copy.deepcopy(module), torch.randn(2, 3, N)
    flashnorm.accelerate_(model, {"x": x})
    with torch.no_grad():
        truth, limit = exactly(module, x)
        for _ in range(3):
            assert float((model(x) - truth).abs().max()) <= limit
    return {part.path: part for part in flashnorm.acceleration(model).parts}


def fusible(module):
    return find_fusible(record(random_(module), {"x": torch.randn(2, 3, N)}))


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(bias):
    name = "inner.bias" if bias else ""
    found = fusible(Before(nn.Linear(N, N, bias=bias)))
    assert found.linears == {"inner": Linear("inner", "inner.weight", name)}
    assert found.readers["norm"] == ("inner",)
    assert check(Before(nn.Linear(N, N, bias=bias)))["norm"].precomputed == ("inner",)


def test_a_weight_that_is_held_as_in_and_out():
    found = fusible(Before(InOut()))
    assert found.turned == {"inner": Linear("inner", "inner.weight", turned=True)}
    assert "inner" not in found.linears
    assert check(Before(InOut()))["norm"].precomputed == ("inner",)


@pytest.mark.parametrize("kind", [Flipped, Half, lambda: More(N, N), lambda: Within(N, N)])
def test_what_only_looks_like_one(kind):
    assert not fusible(Before(kind())).linears
    assert check(Before(kind()))["inner"].reason


def test_what_is_not_always_one():
    assert "inner.part" not in fusible(Before(NotAlways())).linears
    assert check(Before(NotAlways()))["inner.part"].reason


@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_module(bias):
    gate, up = Rows("inner.gate", 0, M), Rows("inner.up", 0, M)
    found = fusible(Before(Glu(bias)))
    assert found.gated == {"inner": Gated("inner", gate, up, "inner.down", "silu")}
    assert found.readers["norm"] == ("inner",)
    assert check(Before(Glu(bias)))["norm"].precomputed == ("inner",)


def test_the_order_of_gate_and_up_does_not_matter():
    found = fusible(Before(UpFirst())).gated["inner"]
    assert (found.gate.path, found.up.path, found.activation) == (
        "inner.gate",
        "inner.up",
        "gelu_tanh",
    )
    check(Before(UpFirst()))


def test_halves_of_one_weight():
    found = fusible(Before(OneWeight())).gated["inner"]
    assert (found.gate, found.up) == (Rows("inner.both", M, M), Rows("inner.both", 0, M))
    check(Before(OneWeight()))
    found = fusible(Before(Sliced())).gated["inner"]
    assert (found.gate, found.up, found.activation) == (
        Rows("inner.both", 0, M),
        Rows("inner.both", M, M),
        "gelu",
    )
    check(Before(Sliced()))


@pytest.mark.parametrize("kind", [Scaled, TwoInputs, AddsItself, Tanh, Thrice])
def test_what_only_looks_gated(kind):
    assert "inner" not in fusible(Before(kind())).gated
    check(Before(kind()))


class Changed(nn.Module):
    """The norm's output is changed in place before the linear layer sees it."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = Norm(), nn.Linear(N, N)

    def forward(self, x):
        return self.linear(self.norm(x).mul_(2))


class Sometimes(nn.Module):
    """The second call of the norm is read by another layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.other = Norm(), nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x):
        return self.one(self.norm(x)) + self.other(self.norm(x + 1))


class Last(nn.Module):
    """Only a part of the norm's output is read, as a head reads the last position."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = Norm(), nn.Linear(N, N)

    def forward(self, x):
        return self.linear(self.norm(x)[:, -1:])


@pytest.mark.parametrize("kind", [Changed, Sometimes, Last])
def test_who_does_not_always_read_the_very_output_is_no_reader(kind):
    assert "norm" not in fusible(kind()).readers
    assert check(kind())["norm"].precomputed == ()


class Spelled(nn.Module):
    """A norm with the parameters that its code, an expression of itself `m` and x, names."""

    def __init__(self, code, alpha=(1,)):
        super().__init__()
        shapes = {"alpha": alpha, "gain": (N,), "bias": (N,)}
        for name, shape in shapes.items():
            if f"m.{name}" in code:
                setattr(self, name, nn.Parameter(torch.randn(shape)))
        if "m.number" in code:
            self.register_buffer("number", torch.tensor([0.7]))


def spelled(code, alpha=(1,)):
    """The module of a class of its own, as a person would have written it."""
    names = {"torch": torch}
    exec(f"def forward(m, x):\n    return {code}", names)
    return type("Dynamic", (Spelled,), {"forward": names["forward"]})(code, alpha)


TANH = {
    "torch.tanh(m.alpha * x) * m.gain + m.bias": 0.0,
    "m.bias + m.gain * (x * m.alpha).tanh()": 0.0,
    "torch.tanh(m.alpha * x) * m.gain": 0.0,
    "torch.tanh(x * m.alpha) + m.bias": 0.0,
    "torch.tanh(x * m.alpha)": 0.0,
    "torch.tanh(m.alpha * x) * (1 + m.gain) + m.bias": 1.0,
    "torch.tanh(m.alpha.float() * x.float()).to(x.dtype) * m.gain": 0.0,
    "x.mul(m.alpha).tanh_().mul_(m.gain)": 0.0,
}


@pytest.mark.parametrize("alpha", [(1,), ()], ids=str)
@pytest.mark.parametrize("code", TANH)
def test_a_dynamic_tanh(code, alpha):
    module = Before(nn.Linear(N, N))
    module.norm = spelled(code, alpha)
    held = {name: f"norm.{name}" for name, _ in module.norm.named_parameters()}
    gain, bias = held.get("gain", ""), held.get("bias", "")
    expected = Normed("norm", "dyt", N, 0.0, gain, TANH[code], bias, "norm.alpha")
    assert fusible(module).norms == {"norm": expected}
    part = check(module)["norm"]
    assert (part.reason, part.precomputed) == ("", ("inner",))


# What only looks like one, with the reason; None where it is no norm at all.
NO_TANH = {
    "torch.tanh(x) * m.gain": None,  # an activation with a scale
    "torch.tanh(0.5 * x) * m.gain": None,
    "torch.tanh(m.number * x) * m.gain": None,
    "torch.tanh(x / m.alpha) * m.gain": NOT_DYNAMIC,
    "torch.tanh((m.alpha + 1) * x) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha.exp() * x) * m.gain": NOT_DYNAMIC,
    "torch.tanh(2 * m.alpha * x) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * x * 2) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * m.alpha * x) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * x + 1) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * (x + 1)) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * x.sin()) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * x.clamp(-1, 1)) * m.gain": NOT_DYNAMIC,
    "torch.tanh((m.alpha * x).clamp(-1, 1)) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * x).clamp(-0.5, 0.5) * m.gain": NOT_ALONE,
    "torch.tanh(m.alpha * torch.tanh(m.alpha * x)) * m.gain": NOT_ALONE,
    "torch.tanh(m.alpha * x) * m.gain + x": NOT_ALONE,
    "torch.tanh(m.alpha * x) * (m.gain + x)": NOT_ALONE,
    "torch.erf(m.alpha * x) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * x.flip(-1)) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * x[..., :1]) * m.gain": NOT_DYNAMIC,
    "torch.tanh(m.alpha * x) * m.gain[0] + m.bias": "a whole parameter",
    "torch.tanh(m.alpha * x) * m.gain.flip(0)": "a whole parameter",
}


@pytest.mark.parametrize("code", NO_TANH)
def test_what_only_looks_like_a_dynamic_tanh(code):
    refused(Before(nn.Linear(N, N)), spelled(code), NO_TANH[code])


# One number of more axes than x could give the result more axes than x has.
ALPHAS = {(N,): None, (1, N): None, (3, 1): None, (1, 1): NOT_DYNAMIC, (1, 1, 1): NOT_DYNAMIC}


@pytest.mark.parametrize("shape", ALPHAS, ids=str)
def test_alpha_that_is_no_single_number(shape):
    code = "torch.tanh(m.alpha * x) * m.gain + m.bias"
    refused(Before(nn.Linear(N, N)), spelled(code, shape), ALPHAS[shape])


def refused(module, norm, reason):
    module.norm = norm
    found = fusible(module)
    assert "norm" not in found.norms
    assert (reason or "") in found.unfit.get("norm", "")
    parts = check(module)
    assert "norm" not in parts or parts["norm"].reason


class Scales(nn.Module):
    """What the norm is given is a multiple of something, which is not the norm's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(1))
        self.norm = spelled("torch.tanh(m.alpha * x) * m.gain + m.bias")
        self.inner = nn.Linear(N, N)

    def forward(self, x):
        return self.inner(self.norm(self.scale * x)) + self.inner(self.norm(x * 3))


def test_what_a_dynamic_tanh_is_given_does_not_matter():
    assert fusible(Scales()).norms["norm"].alpha == "norm.alpha"
    assert not check(Scales())["norm"].reason


class Elsewhere(nn.Module):
    """αx is made outside of the module that is called with x."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = spelled("torch.tanh(m.product) * m.gain"), nn.Linear(N, N)
        self.norm.alpha = nn.Parameter(torch.randn(1))

    def forward(self, x):
        self.norm.product = self.norm.alpha * x
        return self.inner(self.norm(x))


def test_a_product_that_is_made_elsewhere_is_not_the_modules_own():
    found = fusible(Elsewhere())
    assert "norm" not in found.norms
    assert NOT_DYNAMIC in found.unfit["norm"]
