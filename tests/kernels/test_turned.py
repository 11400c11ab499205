"""Weights held as [in, out] against the float64 reference: ISA × norm × dtype × sizes."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu import operators, policy
from flashnorm.kernels.cpu.library import use_isa
from flashnorm.kernels.weights import turned
from tests.kernels import cases
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, ISAS, make

pytestmark = cases.compiled

# Features: fewer than a group of rows, whole groups, and some more; columns: with and without a
# rest behind whole lines and vectors, and wider than a band.
WIDTHS = (2, 8, 33, 579)
OUTPUTS = (2, 7, 64, 70, 2100)


def turn(call: Call) -> Call:
    """The same weights, held as [in, out] with something between the rows."""
    held = [torch.cat((w.T, w.T[:, :3] + 1), 1) for w in call.dense_weights()]
    views = [h[:, : w.shape[0]].T for h, w in zip(held, call.weights, strict=True)]
    assert all(map(turned, views))
    return call._replace(weights=views)


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_sizes(isa, dtype, norm, monkeypatch):
    monkeypatch.setattr(policy, "ROWS_TURNED", 10**9)  # none for the library
    with use_isa(isa):
        for i, (n, k) in enumerate(itertools.product(WIDTHS, OUTPUTS)):
            for rows in (1, (2, 3, 5, 16, 17)[i % 5]):
                options = {"gain": i % 2 == 1, "norm_bias": i % 4 == 3, "bias": (i + rows) % 3 == 1}
                call = turn(make((rows, n), (k,), dtype, norm, residual=i % 5 == 2, **options))
                assert cpu.why_not(call) is None
                assert_close(call, cpu.run(call), what=(n, k, rows))


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_glu(isa, dtype, activation):
    with use_isa(isa):
        for rows, n, k in ((1, 33, 5), (2, 64, 131), (5, 7, 2070), (16, 40, 66)):
            options = {"bias": rows == 2, "residual": rows == 5}
            call = turn(make((rows, n), (k, k), dtype, activation=activation, **options))
            assert_close(call, cpu.run(call), what=(rows, n, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_readers_of_one_norm_in_one_call(isa, dtype):
    with use_isa(isa):
        for rows in (1, 4, 9):
            call = turn(make((rows, 50), (37, 5, 2, 130), dtype, "layer", gain=True, bias=True))
            call = call._replace(biases=[call.biases[0], None, *call.biases[2:]])
            assert_close(call, cpu.run(call), what=rows)


@pytest.mark.parametrize("isa", ISAS)
def test_weights_and_x_of_different_dtypes(isa):
    with use_isa(isa):
        for x, w in itertools.product(DTYPES, DTYPES):
            call = turn(make((3, 35), (19,), x, gain=True))
            call = call._replace(weights=[v.T.to(w).T for v in call.weights])
            assert_close(call, cpu.run(call), what=(x, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_through_the_library(dtype):
    call = turn(make((3, 7, 65), (24,), dtype, gain=True, bias=True, residual=True))
    assert cpu.most_rows(call) == 16
    assert_close(call, cpu.run(call), fused=False)


@pytest.mark.parametrize("shape", [(1, 96), (16, 96)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_give_the_same_bits(dtype, shape):
    before = torch.get_num_threads()
    call = turn(make(shape, (2501, 700), dtype, "layer", gain=True))
    try:
        torch.set_num_threads(1)
        one = cpu.run(call)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, cpu.run(call), one)), threads
    finally:
        torch.set_num_threads(before)


def test_one_call_takes_one_layout():
    call = make((1, 40), (30, 20), torch.float32)
    mixed = call._replace(weights=[call.weights[0], turn(call).weights[1]])
    assert "one call takes one layout" in cpu.why_not(mixed)
    assert not operators.takes(mixed)


def test_a_single_feature_or_output_is_no_layout():
    for n, k in ((1, 9), (9, 1), (1, 1)):
        call = make((2, n), (k,), torch.float32, "none")
        call = call._replace(weights=[call.weights[0].T.contiguous().T])
        assert cpu.why_not(call) is None
        assert_close(call, cpu.run(call), what=(n, k))


@pytest.mark.skipif(not operators.AVAILABLE, reason="torch has no stable interface here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_of_compiled_graphs(dtype):
    call = turn(make((2, 40), (30, 21), dtype, "layer", gain=True, norm_bias=True, bias=True))
    assert operators.takes(call)
    assert_close(call, operators.norm_linear(call))
