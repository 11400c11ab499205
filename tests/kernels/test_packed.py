"""Rows that are packed first, in panels or tiles (AMX): every edge of a panel, tile and block."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu import policy
from flashnorm.kernels.cpu.library import load, use_isa
from tests.kernels import cases
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, ISAS, make, random

pytestmark = cases.compiled
BF16 = torch.bfloat16
ROWS = (2, 7, 15, 16, 17, 31, 32, 33, 47, 64, 100)
OUTPUTS = (1, 11, 12, 16, 17, 33, 48, 49, 70)


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


@pytest.fixture(autouse=True)
def _packed(isa, monkeypatch):
    """No rows for the library, nor as they come: packed tables take two rows and more."""
    cases.rows_for_kernels(monkeypatch, 10**9)
    library = load()
    with use_isa(isa):
        for number, wide in itertools.product(range(len(DTYPES)), (0, 1)):
            library.set_panel_rows(number, wide, 2)
        yield


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 33, 96, 701])
def test_sizes(n, dtype, norm):
    """701 features are more than a block of a panel on every instruction set, and are odd."""
    first = EVERY_NORM.index(norm) + DTYPES.index(dtype)  # so that all sizes have their turn
    for i, (rows, k) in enumerate([*itertools.product(ROWS, OUTPUTS)][first % 5 :: 5]):
        options = {"gain": i % 2 == 1, "norm_bias": i % 4 == 3, "bias": i % 3 == 1}
        call = make((rows, n), (k,), dtype, norm, residual=i % 5 == 2, **options)
        assert_close(call, cpu.run(call), what=(rows, k, options))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("amx", "avx512bf16")])
def test_rows_are_rounded_first_where_bf16_is_multiplied(isa):
    """The bounds of this file are as wide as that, and no wider."""
    assert policy.rounds_first(make((2, 64), (8,), BF16))
    assert policy.rounds_first(make((2, 63), (8,), BF16))
    assert not policy.rounds_first(make((1, 64), (8,), BF16))
    for dtype in (torch.float16, torch.float32):
        assert not policy.rounds_first(make((4, 64), (8,), dtype))


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu(dtype, activation):
    for i, (rows, k) in enumerate(itertools.product((2, 17, 33, 64), (1, 16, 33, 70))):
        options = {"bias": i % 2 == 1, "residual": i % 3 == 1, "gain": i % 4 == 2}
        call = make((rows, 64), (k, k), dtype, "rms", activation=activation, **options)
        assert_close(call, cpu.run(call), what=(rows, k, options))


def test_readers_of_one_norm_whose_edges_are_no_edges_of_tiles():
    for rows in (2, 20, 70):
        call = make((rows, 96), (37, 0, 5, 1, 130), BF16, gain=True, bias=True)
        call = call._replace(biases=[call.biases[0], None, *call.biases[2:]])
        assert_close(call, cpu.run(call), what=rows)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_give_the_same_bits(threads):
    before = torch.get_num_threads()
    call = make((70, 512), (501, 501), BF16, activation="silu", gain=True)
    try:
        torch.set_num_threads(1)
        expected = cpu.run(call)[0]
        torch.set_num_threads(threads)
        assert torch.equal(cpu.run(call)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_more_rows_than_are_packed_at_once():
    """16384 features fit tiles 32 rows at a time, panels take 512 rows."""
    for rows, n in ((65, 16384), (1030, 33)):
        call = make((rows, n), (9,), BF16, bias=True, residual=True)
        assert_close(call, cpu.run(call), what=rows)


def test_a_row_has_the_same_bits_wherever_it_stands():
    """Its sums have an order that does not depend on what else is in the panel."""
    for dtype in DTYPES:
        call = make((70, 701), (50,), dtype, gain=True)
        expected = cpu.run(call)[0]
        for rows in ((0, 2), (5, 30), (33, 70)):
            some = call._replace(x=call.x[slice(*rows)].contiguous())
            assert torch.equal(cpu.run(some)[0], expected[slice(*rows)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    big = random(20, 6, 200, dtype=dtype)
    weight = random(80, 100, dtype=dtype)
    for x in (big[..., 20:84], big[::2, 1, :64], big.transpose(0, 1)[..., :64]):
        for w in (weight[:, 7:71], weight[::3, :64]):
            call = make((1, 64), (1,), dtype, gain=True)._replace(x=x, weights=[w])
            assert_close(call, cpu.run(call))


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("size", [1e-39, 1e-30, 1e-12, 1e12, 1e30, 3e37])
def test_no_magnitude_is_special(size, norm):
    for gain in (False, norm != "none"):  # x g may leave the range where x W does not
        call = make((18, 64), (9,), BF16, norm, gain=gain)
        sizes = torch.tensor([size, 1.0, 0.0] * 6).double()[:, None]
        call = call._replace(x=(call.x.double() * sizes).to(BF16))
        assert_close(call, cpu.run(call), what=gain)


def test_nan_and_infinity_spoil_their_row_or_column_only():
    for norm, gain in itertools.product(EVERY_NORM, (False, True)):
        for value in (float("nan"), float("inf"), float("-inf")):
            call = make((18, 64), (36,), BF16, norm, gain=gain)
            call.x[17, 40] = value
            call.weights[0][33, 63] = value
            assert_close(call, cpu.run(call), what=(norm, value))


def test_torchs_own_tiles_are_left_as_they_were():
    """Its matmul may configure tiles of its own, before and after ours."""
    a, b = random(64, 128, dtype=BF16), random(96, 128, dtype=BF16)
    expected = torch.nn.functional.linear(a, b)
    call = make((33, 64), (40,), BF16)
    for _ in range(3):
        cpu.run(call)
        assert torch.equal(torch.nn.functional.linear(a, b), expected)
