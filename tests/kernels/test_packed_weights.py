"""Packed weights: every format, norm, odd size and instruction set, against their float64 values."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu.library import use_isa
from tests.kernels import cases, packed
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, ISAS, make

pytestmark = cases.compiled
FEATURES = (1, 7, 31, 32, 64, 65, 96, 200, 256, 288, 300, 512, 544, 576, 800)
WIDTHS = (1, 2, 3, 5, 8, 63, 64, 65, 130)
FEW = (1, 2, 3, 4, 5, 7, 16)  # rows of x as they come; more are packed in panels
MANY = (17, 33, 40)


@pytest.fixture(params=ISAS)
def isa(request):
    with use_isa(request.param):
        yield request.param


def case(
    name: str, rows: int, n: int, widths: tuple[int, ...], dtype, norm="rms", **options
) -> Call:
    kind, each = packed.EVERY[name]
    n = max(n // each, 1) * each
    call = make((rows, n), widths, dtype, norm, **options)
    return call._replace(weights=[kind(k, n, seed) for seed, k in enumerate(widths)])


@pytest.mark.parametrize("name", packed.EVERY)
def test_every_size(name, isa):
    for i, (rows, n) in enumerate(itertools.product((1, 2, 3, 5, 16, 17, 33), FEATURES)):
        options = {"gain": i % 2 == 1, "bias": i % 3 == 1, "residual": i % 5 == 1}
        call = case(name, rows, n, (WIDTHS[i % 9],), DTYPES[i % 3], EVERY_NORM[i % 3], **options)
        assert cpu.why_not(call) is None
        assert_close(call, cpu.run(call), what=(rows, call.x.shape, options))
