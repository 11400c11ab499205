"""What test_extremes.py leaves out: every argument, epilogue and path at the ends of the range."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu.library import use_isa
from tests.kernels import cases
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, ISAS, make, random
from tests.kernels.test_extremes import MAGNITUDES

pytestmark = cases.compiled

ALL = {"gain": True, "norm_bias": True, "bias": True}
# Of weights: products with any x whose mean square is ordinary stay within float32.
WEIGHTS = {
    torch.float32: (1e-15, 1e15),
    torch.bfloat16: (1e-15, 1e15),
    torch.float16: (2e-7, 1e-4, 1e3),
}


def scaled(call: Call, size: float) -> Call:
    """The same with x of another size, in its middle row."""
    sizes = torch.ones(call.x.shape[0], 1, dtype=torch.float64)
    sizes[1] = size
    return call._replace(x=(call.x.double() * sizes).to(call.x.dtype))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_magnitudes_of_x_with_every_option(isa, dtype, norm):
    with use_isa(isa):
        for size in MAGNITUDES[dtype]:
            if norm == "none" and size > 1e36:
                continue  # a part of the sum is beyond float32 although all of it is not
            for options in ({"norm_bias": True}, {**ALL, "residual": True}):
                call = scaled(make((3, 70), (9,), dtype, norm, **options), size)
                assert_close(call, cpu.run(call), what=(size, options))


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_magnitudes_of_x_before_a_glu_and_the_library(isa, dtype, norm, monkeypatch):
    with use_isa(isa):
        for size, activation in itertools.product(MAGNITUDES[dtype], EVERY_ACTIVATION):
            call = scaled(make((3, 70), (9, 9), dtype, norm, activation=activation, eps=0.0), size)
            assert_close(call, cpu.run(call), what=(size, activation))
            found = cpu._many_rows(call)
            assert_close(call, found, fused=False, what=(size, activation, "library"))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_magnitudes_of_weights(isa, dtype, norm):
    with use_isa(isa):
        for size in WEIGHTS[dtype]:
            for options in ({}, ALL):
                call = make((3, 70), (9,), dtype, norm, **options)
                weights = [(w.double() * size).to(dtype) for w in call.weights]
                call = call._replace(weights=weights)
                assert_close(call, cpu.run(call), what=(size, options))


@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_large_means_with_every_option_and_on_every_path(isa, dtype, mean):
    """In a half dtype x itself is coarse there: the reference sees the same coarse x."""
    with use_isa(isa):
        for n, options in itertools.product((67, 1000), ({}, ALL)):
            x = (random(3, n, dtype=torch.float64) * 10 + mean).to(dtype)
            call = make((3, n), (5,), dtype, "layer", **options)._replace(x=x)
            assert_close(call, cpu.run(call), what=(n, options))
            assert_close(call, cpu._many_rows(call), fused=False, what=(n, options, "library"))
            glu = make((3, n), (5, 5), dtype, "layer", activation="silu", **options)._replace(x=x)
            assert_close(glu, cpu.run(glu), what=(n, options, "glu"))


def spoiled(call: Call, name: str, value: float) -> Call:
    """One element of an argument is not a number."""
    given = getattr(call, name)
    tensor = given[0] if isinstance(given, (list, tuple)) else given
    tensor.view(-1)[tensor.numel() // 2] = value
    return call


SPECIAL = [float("nan"), float("inf"), float("-inf")]
ARGUMENTS = ["x", "weights", "biases", "gain", "norm_bias", "output_residual"]


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_pass_through_every_argument(isa, dtype, norm):
    arguments = [*ARGUMENTS, "alpha"] if norm == "dyt" else ARGUMENTS
    with use_isa(isa):
        for name, value, n in itertools.product(arguments, SPECIAL, (7, 66)):
            call = spoiled(make((3, n), (6,), dtype, norm, **ALL, residual=True), name, value)
            assert_close(call, cpu.run(call), what=(name, value, n))
            if name != "weights":  # whose NaN a library may keep from no row
                found = cpu._many_rows(call)
                assert_close(call, found, fused=False, what=(name, value, n, "library"))


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_pass_through_a_gate(isa, dtype, activation):
    """In one column of the gate, of the linear half, and in a row of x."""
    with use_isa(isa):
        for value, half, rows in itertools.product(SPECIAL, (0, 1, None), (1, 3)):
            call = make((rows, 33), (6, 6), dtype, "rms", bias=True, activation=activation)
            if half is None:
                call.x[rows // 2, 5] = value
            else:
                call.biases[half][4] = value
            assert_close(call, cpu.run(call), what=(value, half, rows))


@pytest.mark.parametrize("isa", ISAS)
def test_a_reader_that_is_not_a_number_spoils_no_other(isa):
    with use_isa(isa):
        for dtype, value in itertools.product(DTYPES, SPECIAL):
            call = spoiled(make((2, 33), (5, 7, 3), dtype, "layer", **ALL), "weights", value)
            found = cpu.run(call)
            assert_close(call, found, what=(dtype, value))
            assert all(y.isfinite().all() for y in found[1:])
