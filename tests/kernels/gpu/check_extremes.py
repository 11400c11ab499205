"""Magnitudes, means and values that are not numbers, on every way."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.kernels import gpu, norms, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import rows
from flashnorm.kernels.gpu.step import execute
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, make, random
from tests.kernels.gpu.calls import DEVICE, check, there
from tests.kernels.test_extremes import STEP, activation_size

# Where all products stay within float32; float16 ends before that.
MAGNITUDES = {
    torch.float32: (1e-30, 1e-12, 1e12, 1e30),
    torch.bfloat16: (1e-30, 1e-12, 1e12, 1e30),
    torch.float16: (1e-7, 1e-4, 1e4),
}
ALL = {"gain": True, "norm_bias": True, "bias": True}
SPECIAL = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_magnitude_is_special(dtype, norm):
    """Also where ε is no help, and beside rows of ordinary size."""
    for size, eps in itertools.product(MAGNITUDES[dtype], (1e-5, 1e-90)):
        for count, options in ((1, {"gain": True, "bias": True}), (3, {})):
            call = make((count, 70), (9,), dtype, norm, eps=eps, **options)
            sizes = torch.tensor([[size], [1.0], [size]][:count], dtype=torch.float64)
            call = call._replace(x=(call.x.double() * sizes).to(dtype))
            check(call, what=(size, eps, count, options))


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_layer_norm_keeps_its_variance_beside_a_large_mean(mean):
    """Raw sums of squares would lose it at 1e4, and `μ u` off the product every digit of it."""
    for n, count in itertools.product((64, 579, 2100), (1, 2)):
        call = make((count, n), (5,), torch.float32, "layer", bias=True)
        check(call._replace(x=random(count, n, dtype=torch.float32) + mean), what=(n, count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_far_outside_of_a_layer_norm(dtype):
    """The first one too, which a shifted sum would be shifted by."""
    for place, count in itertools.product((0, 40), (1, 3)):
        call = make((count, 70), (5,), dtype, "layer", gain=True)
        call.x[:, place] = 3e4
        check(call, what=(place, count))


def test_rows_of_one_value():
    for norm, value, count in itertools.product(EVERY_NORM, (0.0, 3.0), (1, 2)):
        call = make((count, 33), (5,), torch.float32, norm, bias=True)
        check(call._replace(x=torch.full((count, 33), value)), what=(norm, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float16_gain_that_would_overflow_before_the_scale(dtype):
    """x · g is beyond float16 although the normalized row is not."""
    for count, norm in itertools.product((1, 3), ("rms", "layer")):
        call = make((count, 70), (9,), dtype, norm, gain=True, gain_offset=100.0)
        check(call._replace(x=call.x * 2000), what=(count, norm))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_pass_through(dtype, norm):
    """In x, where they spoil their row and no other, and in a weight, where they spoil a column."""
    for value, (count, options) in itertools.product(SPECIAL, ((1, ALL), (3, {}), (3, ALL))):
        call = make((count, 66), (4,), dtype, norm, **options)
        call.x[count // 2, 33] = value
        call.weights[0][2, 65] = value
        check(call, "skinny", *(["gemm"] if count > 1 else []), what=(value, count))


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_nan_and_infinity_pass_through_a_gate(activation):
    for value, (half, count) in itertools.product(SPECIAL, ((0, 1), (1, 3))):
        call = make((count, 33), (6, 6), torch.bfloat16, bias=True, activation=activation)
        call.biases[half][4] = value
        check(call, what=(value, half, count))


def every_size() -> torch.Tensor:
    """[1, N]: a row of numbers of all sizes."""
    exponents = torch.linspace(-37, 38, 6001, dtype=torch.float64)
    near = torch.linspace(-12, 12, 12_001, dtype=torch.float64)
    a = torch.cat([10**exponents, -(10**exponents), near, 10 * near, torch.zeros(1)])
    return torch.cat([a, torch.tensor(SPECIAL)]).float()[None, :]


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_activations_over_every_exponent(activation):
    """act(a) ⊙ 1 within a few roundings; e^a is known to as many of them as |a| has."""
    a = every_size()
    call = Call(a, (), activation=activation)
    products = [a.to(DEVICE), torch.ones_like(a).to(DEVICE)]
    y = torch.empty_like(products[0])
    execute([rows.gate_step(call, products, None, y)])
    got = y.cpu().double()
    expected = reference.ACTIVATIONS[activation](a.double())
    special = ~expected.isfinite()
    assert torch.equal(got[special].isnan(), expected[special].isnan())
    size = activation_size(activation, a.double(), expected)
    if activation == "silu":
        size = size * (1 + a.double().abs().clamp(max=100) / 2)
    limit = STEP * size + 2.0**-126
    assert ((got - expected).abs() <= limit)[~special].all()


def test_tanh_over_every_exponent():
    a = every_size()
    got = gpu.normalize(Call(a.to(DEVICE), (), norm=norms.DYT, eps=0.0)).cpu().double()
    expected = torch.tanh(a.double())
    assert torch.equal(got.isnan(), expected.isnan())
    known = ~expected.isnan()
    limit = 3 * 2.0**-23 * expected.abs() + 2.0**-149
    assert ((got - expected).abs() <= limit)[known].all()


def test_bfloat16_is_rounded_to_nearest_even_and_keeps_every_nan():
    """In the interpreter this holds the stand-in for the rounding; on a GPU the rounding itself."""
    bits = torch.tensor([0x7FFFFFFF, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x3F807FFF])
    bias = torch.cat([bits.int().view(torch.float32), -bits[1:].int().view(torch.float32)])
    call = make((1, 8), (len(bias),), torch.bfloat16, "none")
    call = call._replace(x=torch.zeros(1, 8).bfloat16(), biases=[bias])
    for count in (1, 2):
        call = call._replace(x=torch.zeros(count, 8).bfloat16())
        got = gpu.run(there(call), "skinny")[0].cpu()
        expected = bias.bfloat16().expand(count, -1)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got[:, 1:], expected[:, 1:])
