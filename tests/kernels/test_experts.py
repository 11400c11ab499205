"""Rows that go to some of the matrices in one tensor, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from flashnorm.kernels import norms
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import experts
from flashnorm.kernels.cpu.library import use_isa
from tests.kernels import cases
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, ISAS, random

pytestmark = cases.compiled

MANY = 11
# Of one row to more experts than a call takes, an expert twice; of several rows, to some of them.
GROUPS = {
    "one": (1, [(4, 1)]),
    "one row to nine": (1, [(e, 1) for e in (3, 0, 10, 7, 7, 1, 2, 5, 9)]),
    "rows apart": (7, [(0, 1), (2, 4), (10, 2)]),
}


def weights(n, k, dtype, held="out, in", bias=True):
    """[E, k, n] as a model holds them, or with something between the experts and the rows."""
    if held == "in, out":
        weight = random(MANY, n, k, dtype=dtype, scale=n**-0.5).transpose(1, 2)
    elif held == "apart":
        weight = random(MANY, k + 2, n + 5, dtype=dtype, scale=n**-0.5)[:, :k, 3 : n + 3]
    else:
        weight = random(MANY, k, n, dtype=dtype, scale=n**-0.5)
    return weight, random(MANY, k, dtype=dtype, seed=2) if bias else None


@pytest.mark.parametrize("held", ["out, in", "in, out", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_expert_is_its_own_product(isa, dtype, held):
    with use_isa(isa):
        for i, (rows, groups) in enumerate(GROUPS.values()):
            for n, k in ((64, 96), (33, 70)):
                weight, bias = weights(n, k, dtype, held, bias=i != 1)
                x = random(rows, n, dtype=dtype, seed=i)
                assert experts.why_not(x, weight, bias) is None
                y, at = experts.multiply(x, weight, bias, groups), 0
                for e, count in groups:
                    part = x if rows == 1 else x[at : at + count]
                    c = None if bias is None else [bias[e]]
                    call = Call(part, [weight[e]], c, norms.NONE)
                    assert_close(call, [y[at : at + count]], what=(e, n, k))
                    at += count
                assert at == len(y)


def test_what_does_not_fit_is_refused():
    (weight, bias), x = weights(40, 24, torch.float32), torch.randn(1, 40)
    assert experts.why_not(x, weight, bias) is None
    assert "do not fit" in experts.why_not(x[:, :39], weight, bias)
    assert "do not fit" in experts.why_not(x, weight[0], bias)
    assert "do not fit" in experts.why_not(x, weight[:0], bias)
    assert "experts are torch.float16" in experts.why_not(x, weight.half(), bias)
    assert "x is torch.float64" in experts.why_not(x.double(), weight.double(), bias)
    assert "neither rows nor columns" in experts.why_not(x[:, :20], weight[:, :, ::2], bias)
    assert "biases are" in experts.why_not(x, weight, bias[:, :1])
    assert "biases are" in experts.why_not(x, weight, bias.half())
    spread = bias.repeat_interleave(2, 1)[:, ::2]
    assert "not dense" in experts.why_not(x, weight, spread)
