"""Packed weights: every format, norm, odd size and instruction set, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.kernels import reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu import operators
from flashnorm.kernels.cpu.library import use_isa
from flashnorm.kernels.formats import blocks
from tests.kernels import cases, packed
from tests.kernels.bounds import assert_close, bound, wide
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, ISAS, make

pytestmark = cases.compiled
FEATURES = (1, 7, 31, 32, 64, 65, 96, 200, 256, 288, 300, 512, 544, 576, 800)
WIDTHS = (1, 2, 3, 5, 8, 63, 64, 65, 130)
ROWS = (1, 2, 3, 5, 16, 17, 33)  # of x; many are packed in panels
EVERY = pytest.mark.parametrize("name", packed.EVERY)


@pytest.fixture(params=ISAS)
def isa(request):
    with use_isa(request.param):
        yield request.param


def case(
    name: str,
    shape: tuple[int, int],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    norm: str = "rms",
    seed: int = 0,
    **options: object,
) -> Call:
    """A call with weights of a format, of other numbers each and of the same dtypes."""
    kind, each = packed.EVERY[name]
    rows, n = shape[0], max(shape[1] // each, 1) * each
    call = make((rows, n), widths, dtype, norm, **options)
    return call._replace(weights=[kind(k, n, seed + 6 * i) for i, k in enumerate(widths)])


@EVERY
def test_every_size(name, isa):
    for i, shape in enumerate(itertools.product(ROWS, FEATURES)):
        options = {"gain": i % 2 == 1, "bias": i % 3 == 1, "residual": i % 5 == 1}
        call = case(name, shape, (WIDTHS[i % 9],), DTYPES[i % 3], EVERY_NORM[i % 4], i, **options)
        assert cpu.why_not(call) is None
        assert_close(call, cpu.run(call), what=(shape, options))


@EVERY
def test_gates_and_readers_of_one_norm(name, isa):
    for i, (rows, activation) in enumerate(itertools.product((1, 2, 20), EVERY_ACTIVATION)):
        options = {"bias": i % 2 == 0, "gain": i % 3 == 0}
        call = case(name, (rows, 320), (70, 70), DTYPES[i % 3], "rms", i, activation=activation)
        assert_close(call, cpu.run(call), what=(rows, activation))
        call = case(name, (rows, 320), (37, 1, 130), DTYPES[i % 3], EVERY_NORM[i % 4], i, **options)
        assert_close(call, cpu.run(call), what=(rows, options))


@EVERY
def test_operators_give_the_bits_of_calls(name):
    if not operators.AVAILABLE:
        pytest.skip("operators cannot be registered with this torch")
    for i, activation in enumerate((None, "silu")):
        widths = (9, 9) if activation else (7, 12)
        options = {"gain": True, "bias": True, "activation": activation}
        call = case(name, (i + 1, 512), widths, torch.bfloat16, "layer", i, **options)
        assert operators.takes(call)
        found = operators.norm_linear(call)
        assert all(map(torch.equal, found, cpu.run(call)))


@EVERY
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_the_same_bits(name, threads):
    before = torch.get_num_threads()
    for rows in (1, 4, 40):
        call = case(name, (rows, 512), (501, 501), torch.float32, activation="silu", gain=True)
        expected = cpu.run(call)[0]
        try:
            torch.set_num_threads(threads)
            assert torch.equal(cpu.run(call)[0], expected)
        finally:
            torch.set_num_threads(before)


@EVERY
def test_a_large_number_among_small_ones(name, isa):
    """Outliers of x as models have them: what is lost beside them is lost in float32 as well."""
    for size in (1e3, 1e6):
        call = case(name, (1, 576), (65,), torch.float32, "rms", 1)
        x = call.x.clone()
        x[0, 5] *= size
        call = call._replace(x=x)
        assert_close(call, cpu.run(call), what=size)


@EVERY
@pytest.mark.parametrize("size", [1e-39, 1e-30, 1e-12, 1e12, 1e30])
def test_no_magnitude_of_x_is_special(name, size, isa):
    for norm in ("none", "rms"):
        call = case(name, (1, 256), (9,), torch.float32, norm)
        call = call._replace(x=call.x * size, eps=0.0)
        assert_close(call, cpu.run(call), what=(size, norm))


@EVERY
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_rows_that_are_not_finite_stay_so_and_spoil_no_other(name, value, isa):
    call = case(name, (3, 256), (9,), torch.float32, "none")
    x = call.x.clone()
    x[1, 7] = value
    for rows in (x, x[1:2]):
        found = cpu.run(call._replace(x=rows))[0]
        truth = reference.norm_linear(wide(call._replace(x=rows)))[0]
        assert torch.equal(found.isfinite(), truth.isfinite())


def hostile(name: str, value: float, n: int) -> Call:
    """A call of one row whose weight has a scale of this value in row 1."""
    call = case(name, (1, n), (5,), torch.float32, "none", 2)
    weight = call.weights[0]
    if weight.scales is not None:
        scales = weight.scales.clone()
        scales[1, 0] = value
        return call._replace(weights=[weight._replace(scales=scales)])
    at, kind = packed.halves(name)[0], blocks.find(weight)
    values = weight.values.unflatten(1, (-1, kind.bytes)).clone()
    values[1, 0, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    return call._replace(weights=[weight._replace(values=values.flatten(1))])


@EVERY
@pytest.mark.parametrize("value", [0.0, 6e-8, float("inf"), float("nan")])
def test_hostile_scales(name, value, isa):
    """Zeros, subnormal numbers, infinities: what is finite in float64 is right, and nothing else
    is finite."""
    for rows in (1, 2, 20):
        call = hostile(name, value, 512)
        call = call._replace(x=call.x.expand(rows, -1).contiguous())
        found, (truth,), (limit,) = cpu.run(call)[0], *bound(call)
        finite = truth.isfinite()
        assert torch.equal(found.isfinite(), finite), rows
        assert finite.all() == (value < 1)
        assert ((found.double() - truth).abs() <= limit)[finite].all(), rows


def test_every_number_of_eight_bits(isa):
    """All codes of e4m3, its two NaN too, and of int8, in rows of their own."""
    for name, dtype in (("fp8-rows", torch.float8_e4m3fn), ("int8-rows", torch.int8)):
        call = case(name, (1, 32), (256,), torch.float32, "none")
        codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32).contiguous()
        weight = call.weights[0]._replace(values=codes.view(dtype))
        call = call._replace(weights=[weight])
        for x in (call.x, call.x.expand(3, -1).contiguous()):
            some = call._replace(x=x)
            assert_close(some, cpu.run(some), what=name)


def test_what_does_not_fit_is_refused():
    call = case("int4-groups", (1, 64), (8,), torch.float32)
    weight = call.weights[0]
    refused = {
        "values": weight._replace(values=weight.values[:, :7]),
        "scales": weight._replace(scales=weight.scales[:, :1]),
        "zeros are": weight._replace(zeros=weight.scales.long()),
        "groups of 7": weight._replace(group=7, scales=weight.scales.repeat(1, 9)),
    }
    for text, given in refused.items():
        assert text in cpu.why_not(call._replace(weights=[given]))
    other = case("int8-rows", (1, 64), (8,), torch.float32).weights[0]
    assert "several formats" in cpu.why_not(call._replace(weights=[weight, other]))
    assert "several formats" in cpu.why_not(call._replace(weights=[weight, torch.ones(8, 64)]))
    assert "not dense" in cpu.why_not(
        case("q8_0", (1, 64), (8,), torch.float32)._replace(
            weights=[blocks_with_a_gap(case("q8_0", (1, 64), (8,), torch.float32).weights[0])]
        )
    )


def blocks_with_a_gap(weight):
    values = torch.cat([weight.values, weight.values], 1)[:, : weight.values.shape[1]]
    return weight._replace(values=values)
