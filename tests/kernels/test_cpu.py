"""Every kernel against the float64 reference: instruction set × norm × dtype × odd sizes."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu.library import use_isa
from tests.kernels import cases
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, ISAS, make

pytestmark = cases.compiled

# No width is a multiple of a vector but 64; 579 needs every loop.
WIDTHS = (1, 7, 33, 64, 579)
OUTPUTS = (1, 4, 6, 70)
ROWS = (*range(18), 35)


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    """No rows for the library: the fused kernel takes them all."""
    cases.rows_for_kernels(monkeypatch, 10**9)


def test_the_library_is_there():
    assert ISAS[-1] == "portable"
    usable, said = cpu.available()
    assert usable, said
    assert "torch's OpenMP threads" in said or "one thread" in said


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_sizes(isa, dtype, norm):
    with use_isa(isa):
        for i, (n, k) in enumerate(itertools.product(WIDTHS, OUTPUTS)):
            for rows in ROWS[i % 3 :: 3]:
                options = {"gain": rows % 2 == 1, "norm_bias": rows % 4 == 3, "bias": rows % 3 == 1}
                call = make((rows, n), (k,), dtype, norm, residual=rows % 5 == 2, **options)
                assert cpu.why_not(call) is None
                assert_close(call, cpu.run(call), what=(n, k, rows))


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_glu(isa, dtype, activation):
    with use_isa(isa):
        for rows, n, k in ((1, 33, 1), (2, 64, 131), (5, 7, 70), (17, 40, 66)):
            for norm in ("none", "rms"):
                options = {"bias": rows == 2, "residual": rows == 5}
                call = make((rows, n), (k, k), dtype, norm, activation=activation, **options)
                assert_close(call, cpu.run(call), what=(rows, n, k, norm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_readers_of_one_norm_in_one_call(isa, dtype):
    with use_isa(isa):
        for rows in (1, 4, 9):
            call = make((rows, 50), (37, 5, 1, 130), dtype, gain=True, bias=True)
            call = call._replace(biases=[call.biases[0], None, *call.biases[2:]])
            assert_close(call, cpu.run(call), what=rows)


@pytest.mark.parametrize("isa", ISAS)
def test_a_gain_weights_and_x_of_different_dtypes(isa):
    with use_isa(isa):
        for x, w, g in itertools.product(DTYPES, DTYPES, DTYPES):
            call = make((3, 35), (9,), x, gain=True, norm_bias=True)
            weights = [v.to(w) for v in call.weights]
            call = call._replace(weights=weights, gain=call.gain.to(g))
            assert_close(call, cpu.run(call), what=(x, w, g))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("isa", ISAS)
def test_x_and_weights_with_strides(isa, norm):
    big = cases.random(6, 5, 200, dtype=torch.float32)
    weight = cases.random(40, 100, dtype=torch.float32)
    views = {
        "part of the features": big[..., 20:61],
        "every other row": big[::2, 1, :41],
        "transposed": big.transpose(0, 1)[..., :41],
        "features far apart": big[..., :82:2],
        "one row for all": big[:1, :1, :41].expand(4, 3, 41),
        "one dimension": big[0, 0, :41],
    }
    with use_isa(isa):
        for name, x in views.items():
            for w in (weight[:, 7:48], weight[::3, :41]):
                call = make((1, 41), (1,), torch.float32, norm)._replace(x=x, weights=[w])
                assert cpu.why_not(call) is None
                assert_close(call, cpu.run(call), what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_through_the_library(dtype, monkeypatch):
    cases.rows_for_kernels(monkeypatch, 16)
    for norm, activation in itertools.product(EVERY_NORM, (None, "silu", "gelu")):
        widths = (24,) if activation is None else (24, 24)
        options = {"gain": True, "norm_bias": norm == "layer", "bias": norm == "rms"}
        call = make(
            (3, 7, 65), widths, dtype, norm, activation=activation, residual=True, **options
        )
        assert_close(call, cpu.run(call), fused=False, what=(norm, activation))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(threads):
    before = torch.get_num_threads()
    call = make((3, 300), (501, 501), torch.bfloat16, activation="silu")
    try:
        torch.set_num_threads(1)
        one = cpu.run(call)[0]
        torch.set_num_threads(threads)
        assert torch.equal(cpu.run(call)[0], one)
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once():
    calls = [make((rows, 257), (403,), torch.float32, gain=True) for rows in (1, 2, 7, 16)]
    expected = [cpu.run(call)[0] for call in calls]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(60):
            if not torch.equal(cpu.run(calls[i])[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
