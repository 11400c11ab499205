"""Sums in the graph of a packaged step: products take them up where nobody can tell."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flashnorm.kernels.cpu import operators
from flashnorm.kernels.cpu.packaging import Packaging
from flashnorm.runtime.package.sums import take_up_
from tests.kernels import cases, packed
from tests.kernels.bounds import assert_close
from tests.kernels.cases import random

pytestmark = [
    cases.compiled,
    pytest.mark.usefixtures("only_compiled"),
    pytest.mark.skipif(not operators.AVAILABLE, reason="torch has no stable interface here"),
]
N = 64
OURS = (torch.ops.flashnorm.norm_linear_cpu.default, torch.ops.flashnorm.norm_packed_cpu.default)


def product(x, *weights, activation=0):
    return OURS[0](x, list(weights), [], 0, 0, 1e-5, 0.0, activation)


def rewritten(program, *tensors):
    """(how many sums were taken up, the graph); its results are the program's but for rounding."""
    module = make_fx(program, tracing_mode="fake")(*tensors)
    given = [[t.clone() for t in tensors] for _ in range(2)]
    taken = take_up_(module.graph, Packaging())
    module.graph.lint()
    module.recompile()
    found, expected = module(*given[0]), program(*given[1])
    for a, b in zip((*found, *given[0]), (*expected, *given[1]), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        # Up to two products of N numbers in float32, each off by some N · 2⁻²⁴ of sums below 64; a
        # wrong operand is off by about one.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return taken, module.graph


def sums(graph):
    return sum(node.target is torch.ops.aten.add.Tensor for node in graph.nodes)


def inputs(*more, dtype=torch.float32):
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((2, N), (N, N), *more))]


TAKEN = {
    "after": (lambda x, w, r: (product(x, w) + r,), 1),
    "before": (lambda x, w, r: (r + product(x, w),), 1),
    "a residual of its own input": (lambda x, w, r: (x + product(x, w) * r,), 0),
    "x itself": (lambda x, w, r: (x + product(x, w), r), 1),
    "two products": (lambda x, w, r: (product(x, w) + product(r, w),), 1),
    "one after another": (lambda x, w, r: (r + product(r + product(x, w), w),), 2),
    "a residual that comes later": (lambda x, w, r: (product(x, w) + r.sin(),), 1),
    "a gate": (lambda x, w, r: (product(x, w, w.flip(0), activation=1) + r,), 1),
    "two results": (lambda x, w, r: (product(x, w, w.flip(0)) + torch.cat([r, r], -1),), 0),
    "read twice": (lambda x, w, r: ((y := product(x, w)) + r, y), 0),
    "twice the product": (lambda x, w, r: ((y := product(x, w)) + y, r), 0),
    "broadcast": (lambda x, w, r: (product(x, w) + r[:1],), 0),
    "scaled": (lambda x, w, r: (torch.add(product(x, w), r, alpha=2),), 0),
    "another dtype": (lambda x, w, r: (product(x, w) + r.double(),), 0),
    "a number": (lambda x, w, r: (product(x, w) + 1.5, r), 0),
    "turned": (lambda x, w, r: (product(x, w) + r.T.contiguous().T,), 0),
}


@pytest.mark.parametrize("name", TAKEN)
def test_which_sums_are_taken_up(name):
    program, count = TAKEN[name]
    given = inputs((2, N))
    taken, graph = rewritten(program, *given)
    assert taken == count
    assert sums(graph) == sums(make_fx(program)(*given).graph) - count


def test_no_product_moves_past_one_who_writes():
    def program(x, w, r):
        y = product(x, w)
        x.mul_(3)
        return (y + r,)

    assert rewritten(program, *inputs((2, N)))[0] == 0


def test_a_sum_is_rounded_once():
    """In bf16 the product is not rounded before it is added."""
    call = cases.make((3, N), (N,), torch.bfloat16, "rms", gain=True, bias=True, residual=True)
    alone = call._replace(output_residual=None)
    module = make_fx(lambda r: operators.norm_linear(alone)[0] + r)(call.output_residual)
    assert take_up_(module.graph, Packaging()) == 1
    module.recompile()
    assert_close(call, [module(call.output_residual)])


@pytest.mark.parametrize("name", ["q8_0", "int4-zeros"])
def test_products_with_packed_weights(name):
    call = cases.make((2, N), (N,), torch.float32, "rms", residual=True)
    call = call._replace(weights=[packed.EVERY[name][0](N, N, 3)])
    alone = call._replace(output_residual=None)
    module = make_fx(lambda r: operators.norm_linear(alone)[0] + r)(call.output_residual)
    assert take_up_(module.graph, Packaging()) == 1
    assert [n.target for n in module.graph.nodes if n.target in OURS] == [OURS[1]]
    module.recompile()
    assert_close(call, [module(call.output_residual)])
