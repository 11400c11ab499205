"""Magnitudes, means and values that are not numbers."""

from __future__ import annotations

import pytest
import torch

from flashnorm.kernels import reference
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu.library import use_isa
from tests.kernels import cases
from tests.kernels.bounds import assert_close, wide
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, ISAS, make, random

pytestmark = cases.compiled

# Four units in the last place of float32.
STEP = 8 * 2.0**-24

MAGNITUDES = {
    torch.float32: (1e-40, 1e-30, 1e-12, 1e12, 1e30, 3e37),
    torch.bfloat16: (1e-39, 1e-30, 1e-12, 1e12, 1e30, 3e37),
    torch.float16: (1e-7, 1e-4, 1e4),
}


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_no_magnitude_is_special(isa, dtype, norm):
    """Also where ε is no help, and beside rows of ordinary size."""
    with use_isa(isa):
        for size in MAGNITUDES[dtype]:
            for eps in (1e-5, 1e-90):
                call = make((3, 70), (9,), dtype, norm, gain=True, eps=eps)
                x = (call.x.double() * torch.tensor([[size], [1.0], [size]])).to(dtype)
                call = call._replace(x=x)
                assert_close(call, cpu.run(call), what=(size, eps))
                bare = call._replace(gain=None)  # the products of bf16 pairs
                assert_close(bare, cpu.run(bare), what=(size, eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_linear_of_tiny_and_huge_numbers(isa, dtype):
    with use_isa(isa):
        for size in MAGNITUDES[dtype]:
            call = make((2, 70), (9,), dtype, "none")
            call = call._replace(x=(call.x.double() * size).to(dtype))
            assert_close(call, cpu.run(call), what=size)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("isa", ISAS)
def test_layer_norm_keeps_its_variance_beside_a_large_mean(isa, mean):
    """Raw sums of squares would lose it at 1e4, and `μ u` off the product every digit of it."""
    with use_isa(isa):
        for n in (64, 579, 4096):
            call = make((2, n), (5,), torch.float32, "layer", bias=True)
            call = call._replace(x=random(2, n, dtype=torch.float32) + mean)
            assert_close(call, cpu.run(call), what=n)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_one_value(isa):
    with use_isa(isa):
        for norm in EVERY_NORM:
            for value in (0.0, 3.0):
                call = make((2, 33), (5,), torch.float32, norm, bias=True)
                call = call._replace(x=torch.full((2, 33), value))
                assert_close(call, cpu.run(call), what=(norm, value))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_pass_through(isa, dtype, norm):
    """In x, where they spoil their row and no other, and in a weight, where they spoil a column."""
    with use_isa(isa):
        for n in (7, 66):
            for value in (float("nan"), float("inf"), float("-inf")):
                for gain in (False, True):
                    call = make((3, n), (6,), dtype, norm, gain=gain)
                    call.x[1, n // 2] = value
                    call.weights[0][2, n - 1] = value
                    assert_close(call, cpu.run(call), what=(n, value, gain))


@pytest.mark.parametrize("isa", ISAS)
def test_every_nan_stays_one_when_it_is_rounded(isa):
    """The mantissa of this one would carry into the sign and leave −0."""
    nan = torch.full((19, 8), 0x7FFFFFFF, dtype=torch.int32)
    with use_isa(isa):
        for dtype in DTYPES:
            call = make((1, 8), (19,), dtype, "none")
            call = call._replace(weights=[nan.view(torch.float32)])
            assert cpu.run(call)[0].isnan().all()


def activation_size(activation, a, y):
    """What the roundings of an activation are relative to: its result, but for GELU.

    By erf it loses digits where erf is near −1: relative to a. By tanh the argument z of
    the sigmoid is rounded, which moves it by |z| as much; and float64's own 1 + tanh ends at 2^-53.
    """
    if activation == "gelu":
        return y.abs() + a.abs().clamp(max=8)
    if activation == "gelu_tanh":
        z = (1.6 * a * (1 + 0.044715 * a * a)).abs().clamp(max=120)
        return y.abs() * (1 + z / 2) + a.abs() * 2.0**-53 / STEP
    return y.abs()


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
@pytest.mark.parametrize("isa", ISAS)
def test_activations_over_every_exponent(isa, activation):
    """act(a) · 1 of float32 numbers of all sizes: within a few roundings of a, or of act(a)."""
    exponents = torch.linspace(-40, 38, 20_001, dtype=torch.float64)
    near = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    a = torch.cat([10**exponents, -(10**exponents), near, 10 * near, torch.zeros(1)]).float()
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    a = torch.cat([a, special])[:, None].contiguous()
    call = make((1, 1), (1, 1), torch.float32, "none", activation=activation)._replace(x=a)
    call = call._replace(weights=[torch.ones(1, 1), torch.zeros(1, 1)])
    call = call._replace(biases=[torch.zeros(1), torch.ones(1)])
    with use_isa(isa):
        got = cpu.gate_(a.clone(), torch.ones_like(a), activation).double()
    expected = reference.ACTIVATIONS[activation](wide(call).x)
    special = ~expected.isfinite()
    assert torch.equal(got[special].isnan(), expected[special].isnan())
    limit = STEP * activation_size(activation, a.double(), expected) + 2.0**-126
    assert ((got - expected).abs() <= limit)[~special].all()


@pytest.mark.parametrize("isa", ISAS)
def test_tanh_over_every_exponent(isa):
    exponents = torch.linspace(-40, 38, 20_001, dtype=torch.float64)
    x = torch.cat([10**exponents, -(10**exponents), torch.linspace(-3, 3, 40_001).double()])
    x = torch.cat([x, torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])]).float()
    call = make((1, 1), (1,), torch.float32, "dyt")
    call = call._replace(x=x[:, None].contiguous(), weights=[torch.ones(1, 1)], alpha=None)
    with use_isa(isa):
        got = cpu.normalize_packed(cpu.pack(call), call.x, torch.empty_like(call.x))[:, 0].double()
    expected = torch.tanh(x.double())
    assert torch.equal(got.isnan(), expected.isnan())
    known = ~expected.isnan()
    limit = 3 * 2.0**-23 * expected.abs() + 2.0**-149
    assert ((got - expected).abs() <= limit)[known].all()
