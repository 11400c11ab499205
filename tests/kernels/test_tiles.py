"""Several rows in tiles (AMX): every edge of a tile, of a block of them, and of what is packed."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu import policy
from flashnorm.kernels.cpu.library import use_isa
from tests.kernels import cases
from tests.kernels.bounds import assert_close
from tests.kernels.cases import EVERY_ACTIVATION, EVERY_NORM, make, random

pytestmark = [
    cases.compiled,
    pytest.mark.skipif("amx" not in cases.ISAS, reason="this CPU has no AMX tiles"),
]
BF16 = torch.bfloat16
ROWS = (2, 15, 16, 17, 31, 32, 33, 47, 64, 100)
OUTPUTS = (1, 15, 16, 17, 31, 32, 33, 70)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    """No rows for the library: tiles take them all."""
    cases.rows_for_kernels(monkeypatch, 10**9)
    with use_isa("amx"):
        yield


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("n", [32, 96, 576])
def test_sizes(n, norm):
    for i, (rows, k) in enumerate(itertools.product(ROWS, OUTPUTS)):
        options = {"gain": i % 2 == 1, "norm_bias": i % 4 == 3, "bias": i % 3 == 1}
        call = make((rows, n), (k,), BF16, norm, residual=i % 5 == 2, **options)
        assert policy.rounds_first(call)
        assert_close(call, cpu.run(call), what=(rows, k, options))


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_glu(activation):
    for i, (rows, k) in enumerate(itertools.product((2, 17, 33, 64), (1, 16, 33, 70))):
        options = {"bias": i % 2 == 1, "residual": i % 3 == 1, "gain": i % 4 == 2}
        call = make((rows, 64), (k, k), BF16, "rms", activation=activation, **options)
        assert_close(call, cpu.run(call), what=(rows, k, options))


def test_readers_of_one_norm_whose_edges_are_no_edges_of_tiles():
    for rows in (2, 20, 70):
        call = make((rows, 96), (37, 5, 1, 130), BF16, gain=True, bias=True)
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
    """16384 features: 32 rows at a time; and one row more, which is then alone."""
    for rows in (33, 64, 65):
        call = make((rows, 16384), (40,), BF16, bias=True, residual=True)
        assert_close(call, cpu.run(call), what=rows)


def test_strides():
    big = random(20, 6, 200, dtype=BF16)
    weight = random(80, 100, dtype=BF16)
    for x in (big[..., 20:84], big[::2, 1, :64], big.transpose(0, 1)[..., :64]):
        for w in (weight[:, 7:71], weight[::3, :64]):
            call = make((1, 64), (1,), BF16, gain=True)._replace(x=x, weights=[w])
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
    """Its matmul configures tiles of its own, before and after ours."""
    a, b = random(64, 128, dtype=BF16), random(96, 128, dtype=BF16)
    expected = torch.nn.functional.linear(a, b)
    call = make((33, 64), (40,), BF16)
    for _ in range(3):
        cpu.run(call)
        assert torch.equal(torch.nn.functional.linear(a, b), expected)


def test_one_row_and_odd_widths_do_without():
    assert not policy.rounds_first(make((4, 63), (8,), BF16))
    assert not policy.rounds_first(make((4, 64), (8,), torch.float16))
    with use_isa("avx512bf16"):
        assert not policy.rounds_first(make((4, 64), (8,), BF16))
