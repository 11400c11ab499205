"""A residual that is added before the norm, as engines do: norm(x + r), the sum rounded first."""

import pytest
import torch

from flashnorm import functional
from flashnorm.kernels import dispatch, reference
from tests.kernels.bounds import wide
from tests.kernels.cases import DTYPES, EVERY_NORM, make, random

RESULTS = {
    "linear": ((5,), None),
    "readers": ((5, 7), None),
    "glu": ((6, 6), "silu"),
}


def call_of(norm, dtype, result, rows=3):
    widths, activation = RESULTS[result]
    options = {"gain": True, "norm_bias": True, "bias": True, "activation": activation}
    call = make((2, rows, 16), widths, dtype, norm, **options, residual=result == "linear")
    return call._replace(input_residual=random(2, rows, 16, dtype=dtype, scale=3, seed=9))


def run(call):
    x, weights, biases, norm, eps, gain, offset, bias, alpha, act, after, before = call
    options = {"norm": norm.name, "eps": eps, "gain": gain, "gain_offset": offset}
    options |= {"norm_bias": bias, "alpha": alpha, "input_residual": before}
    if act:
        gates = (*weights, *biases)
        return [functional.norm_glu(x, *gates, activation=act, residual=after, **options)]
    if len(weights) > 1:
        return functional.norm_linears(x, weights, biases, **options)
    return [functional.norm_linear(x, weights[0], biases[0], residual=after, **options)]


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("norm", EVERY_NORM)
def test_is_the_operation_on_the_sum(norm, dtype, result):
    """Few rows (a kernel) and many (a library's product): the same bits as on the rounded sum."""
    for rows in (3, 40):
        call = call_of(norm, dtype, result, rows)
        sum_first = call._replace(x=call.x + call.input_residual, input_residual=None)
        for found, expected in zip(run(call), run(sum_first), strict=True):
            assert torch.equal(found, expected)
        assert not torch.equal(run(call)[0], run(call._replace(input_residual=None))[0])


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("norm", EVERY_NORM)
def test_the_reference_adds_it_too(norm, result):
    exact = wide(call_of(norm, torch.float32, result))
    summed = exact._replace(x=exact.x + exact.input_residual, input_residual=None)
    found, expected = reference.norm_linear(exact), reference.norm_linear(summed)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("norm", EVERY_NORM)
def test_its_gradient_is_that_of_x(norm, result):
    call = call_of(norm, torch.float64, result)
    x, before = (t.clone().requires_grad_() for t in (call.x, call.input_residual))
    assert torch.autograd.gradcheck(
        lambda x, r: tuple(run(call._replace(x=x, input_residual=r))), (x, before)
    )
    total = sum(y.square().sum() for y in run(call._replace(x=x, input_residual=before)))
    one, other = torch.autograd.grad(total, (x, before))
    assert torch.equal(one, other)


@pytest.mark.parametrize("result", RESULTS)
def test_a_compiled_graph_adds_it_too(result):
    torch._dynamo.reset()
    call = call_of("rms", torch.float32, result)

    def compiled(x, before):
        return run(call._replace(x=x, input_residual=before))

    with torch.no_grad():
        found = torch.compile(compiled, backend="eager", fullgraph=True)(
            call.x, call.input_residual
        )
        assert all(map(torch.equal, found, run(call)))


def test_what_is_not_like_x_is_refused():
    call = call_of("rms", torch.float32, "linear")
    for wrong in (torch.ones(16), call.input_residual.double()):
        with pytest.raises(ValueError, match=r"input_residual is .* it must be like x"):
            run(call._replace(input_residual=wrong))
    assert dispatch.explain(call).backend in ("cpu", "reference")
