"""What test_cpu.py leaves out: options × norms × dtypes × instruction sets, threads, many rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu.library import load, use_isa
from tests.kernels import cases
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, ISAS, make, random

pytestmark = cases.compiled

ALL = {"gain": True, "norm_bias": True, "bias": True}


def fused(call: Call) -> list[Tensor]:
    """The fused kernel, however many rows there are."""
    assert cpu.why_not(call) is None
    widths = [w.shape[0] for w in call.weights][: 1 if call.activation else None]
    return cpu.run_packed(cpu.pack(call), call.x, widths, call.output_residual)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_glu_of_every_norm(isa, dtype, norm):
    shapes = ((0, 33, 5), (1, 7, 1), (3, 33, 67), (16, 64, 4), (18, 579, 9))
    with use_isa(isa):
        for (rows, n, k), activation in itertools.product(shapes, EVERY_ACTIVATION):
            for options in ({"gain": rows == 3}, {**ALL, "residual": True}):
                call = make((rows, n), (k, k), dtype, norm, activation=activation, **options)
                if rows == 16 and call.biases is not None:
                    call = call._replace(biases=[None, call.biases[1]])
                assert_close(call, fused(call), what=(rows, n, k, activation))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_readers_of_every_norm(isa, dtype, norm):
    """Also a reader that has no row."""
    with use_isa(isa):
        for rows, n in itertools.product((0, 1, 5, 16, 19), (1, 31, 65)):
            for options in ({}, ALL):
                call = make((rows, n), (37, 0, 1, 66), dtype, norm, **options)
                if call.biases is not None:
                    call = call._replace(biases=[*call.biases[:2], None, call.biases[3]])
                assert_close(call, fused(call), what=(rows, n, options))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_gain_norm_bias_and_offset(isa, dtype, norm):
    with use_isa(isa):
        for gain, norm_bias, offset in itertools.product(
            (False, True), (False, True), (0.0, 0.5, 1.0)
        ):
            for n in (7, 67):
                call = make(
                    (5, n), (9,), dtype, norm, gain=gain, norm_bias=norm_bias, gain_offset=offset
                )
                assert_close(call, fused(call), what=(n, gain, norm_bias, offset))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("isa", ISAS)
def test_dtypes_mixed(isa, norm):
    with use_isa(isa):
        for x, w, g in itertools.product(DTYPES, DTYPES, DTYPES):
            call = make((3, 35), (9,), x, norm, **ALL, residual=True)
            call = call._replace(
                weights=[v.to(w) for v in call.weights],
                biases=[c.to(w) for c in call.biases],
                gain=call.gain.to(g),
                norm_bias=call.norm_bias.to(w),
                alpha=None if call.alpha is None else call.alpha.to(g),
            )
            assert_close(call, fused(call), what=(x, w, g))


@pytest.mark.parametrize("isa", ISAS)
def test_alpha_of_every_shape_and_sign(isa):
    with use_isa(isa):
        for dtype, alpha in itertools.product(DTYPES, (None, 0.0, -1.5, 30.0)):
            for shape in ((), (1,), (1, 1)):
                call = make((2, 35), (9,), dtype, "dyt")
                made = None if alpha is None else torch.full(shape, alpha, dtype=dtype)
                call = call._replace(alpha=made)
                assert_close(call, fused(call), what=(dtype, alpha, shape))


def views(dtype: torch.dtype) -> dict[str, Tensor]:
    """x [.., 41] that is not contiguous."""
    big = random(6, 5, 200, dtype=dtype)
    return {
        "part of the features": big[..., 20:61],
        "every other row": big[::2, 1, :41],
        "transposed": big.transpose(0, 1)[..., :41],
        "features far apart": big[..., :82:2],
        "columns as features": big[0, :, :41].T.contiguous().T,
        "one row for all": big[:1, :1, :41].expand(4, 3, 41),
    }


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_strides_of_x_weights_and_residual(isa, dtype, norm):
    """Every view of x with every one of the weights; k = 1 and odd strides included."""
    weight = random(40, 100, dtype=dtype)
    weights = {"part": weight[:, 7:48], "third rows": weight[::3, :41], "one": weight[5:6, 1:42]}
    with use_isa(isa):
        for (name, x), (said, w) in itertools.product(views(dtype).items(), weights.items()):
            wide = random(*x.shape[:-1], 2 * len(w) + 3, dtype=dtype, seed=2)
            for residual in (wide[..., 1 : len(w) + 1], wide[..., : 2 * len(w) : 2]):
                call = make((1, 41), (1,), dtype, norm)
                call = call._replace(x=x, weights=[w], output_residual=residual)
                assert_close(call, fused(call), what=(name, said))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_many_rows_through_the_library(isa, dtype, norm, monkeypatch):
    """The pass before torch's matmul and the one after it, on every instruction set."""
    cases.rows_for_kernels(monkeypatch, 0)
    with use_isa(isa):
        for n, activation in itertools.product((1, 41, 65), (None, *EVERY_ACTIVATION)):
            for options in ({}, ALL):
                widths = (23,) if activation is None else (23, 23)
                call = make((3, 7, n), widths, dtype, norm, activation=activation, **options)
                assert_close(call, cpu.run(call), fused=False, what=(n, activation, options))
        for name, x in views(dtype).items():
            residual = random(*x.shape[:-1], 23, dtype=dtype, seed=9).mT.contiguous().mT
            call = make((1, 41), (23,), dtype, norm, gain=True)
            call = call._replace(x=x, output_residual=residual)
            assert_close(call, cpu.run(call), fused=False, what=name)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_any_number_of_threads_gives_the_same_bits(isa, count):
    """Readers whose ends are not where a thread's share ends; one thread more than columns."""
    with use_isa(isa):
        for dtype in DTYPES:
            calls = [
                make((3, 300), (403, 1, 0, 258), dtype, "layer", **ALL),
                make((2, 300), (501, 501), dtype, activation="gelu", residual=True),
                make((17, 20_001), (9,), dtype, "dyt", bias=True),
            ]
            for call in calls:
                with threads(1):
                    expected = fused(call)
                with threads(count):
                    found = fused(call)
                assert all(map(torch.equal, found, expected))


def on_one_thread(*given: Tensor | None, linear: Callable[..., Tensor] = F.linear) -> Tensor:
    """The library's product, whose bits depend on how many threads it has."""
    with threads(1):
        return linear(*given)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_passes_around_a_product_give_the_same_bits(isa, count, monkeypatch):
    """Of many rows the norm and the gate are ours, and the product between them is not."""
    monkeypatch.setattr(F, "linear", on_one_thread)
    with use_isa(isa):
        for dtype in DTYPES:
            many = make((31, 70), (40, 40), dtype, activation="silu", **ALL)
            with threads(1):
                expected = cpu._many_rows(many)
            with threads(count):
                assert torch.equal(cpu._many_rows(many)[0], expected[0])


@pytest.mark.parametrize("isa", ISAS)
def test_bandwidth_is_measured_within_the_memory_given(isa):
    """Its result is the time it takes: here, that it reads no byte too many."""
    library = load()
    with use_isa(isa):
        for size, count in itertools.product((0, 1, 63, 64, 65, 4096, 100_003), (1, 3)):
            data = torch.ones(size, dtype=torch.uint8)
            assert library.read(data.data_ptr(), size, count) == 0
