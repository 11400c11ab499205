"""The kernels as operators of torch: the results of calls from Python, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashnorm.kernels.cpu import attention, operators, policy
from flashnorm.kernels.cpu import calls as cpu
from tests.kernels import cases
from tests.kernels.cases import DTYPES, make, random
from tests.kernels.test_attention import GROUPS, MASKS, WIDTHS, made, mask_of

pytestmark = cases.compiled

SHAPES = ((1, 1, 64), (2, 3, 33), (5, 7), (1, 1), (0, 16), (16, 576))
NORMS = ("none", "rms", "layer")
linear = torch.ops.flashnorm.norm_linear_cpu
attend = torch.ops.flashnorm.attend_cpu


def called_from_python(call):
    widths = [w.shape[0] for w in call.weights]
    return cpu.run_packed(cpu.pack(call), call.x, widths[:1] if call.activation else widths, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_the_kernels(shape, norm, dtype):
    for options in (
        {},
        {"gain": True},
        {"norm_bias": True, "bias": True},
        {"gain": True, "bias": True},
    ):
        for widths in ((5,), (1, 33, 8)):
            call = make(shape, widths, dtype, norm, **options)
            assert operators.takes(call)
            for found, expected in zip(
                operators.norm_linear(call), called_from_python(call), strict=True
            ):
                assert found.shape == expected.shape
                assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", cases.EVERY_ACTIVATION)
def test_gated(activation):
    call = make((3, 48), (20, 20), torch.bfloat16, "layer", bias=True, activation=activation)
    assert torch.equal(operators.norm_linear(call)[0], called_from_python(call)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_is_added(dtype):
    for shape in ((1, 1, 64), (2, 3, 33), (20, 576)):
        call = make(shape, (37,), dtype, "rms", gain=True, bias=True, residual=True)
        expected = cpu.run_packed(cpu.pack(call), call.x, [37], call.output_residual)[0]
        assert torch.equal(operators.norm_linear(call)[0], expected)


def test_some_readers_have_a_bias():
    call = make((2, 48), (6, 7, 8), torch.float32, gain=True, norm_bias=True, bias=True)
    call = call._replace(biases=[None, call.biases[1], None])
    for found, expected in zip(operators.norm_linear(call), called_from_python(call), strict=True):
        assert torch.equal(found, expected)


def test_x_and_weights_with_strides():
    call = make((2, 3, 48), (6,), torch.float32)
    x = call.x.transpose(0, 1)
    call = call._replace(x=x, weights=[random(6, 100, dtype=torch.float32)[:, 20:68]])
    found = operators.norm_linear(call)[0]
    expected = called_from_python(call._replace(x=x.contiguous()))[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_attention_is_that_of_the_kernel(heads, mask, dtype):
    for batch, length in ((1, 1), (3, 65)):
        for widths in WIDTHS:
            q, k, v = made(batch, heads, length, widths, dtype)
            hidden = mask_of(mask, batch, length, dtype)
            for given in (hidden, None if hidden is None else hidden[:1]):
                found = operators.attend(q, k, v, 0.3, given)
                assert torch.equal(found, attention.attend(q, k, v, 0.3, given))


def test_attention_with_strides():
    q, k, v = (random(2, 5, 4, 32, dtype=torch.float32, seed=i).transpose(1, 2) for i in range(3))
    q = q[:, :, :1]
    assert torch.equal(operators.attend(q, k, v, 0.2, None), attention.attend(q, k, v, 0.2))


# x, weights, vectors, which, norm, eps, gain_offset, activation
GOOD = (torch.ones(2, 8), [torch.ones(3, 8)], [], 0, 1, 1e-5, 0.0, 0)
BAD = {
    "weight": {1: [torch.ones(3, 7)]},
    "dtype": {1: [torch.ones(3, 8), torch.ones(3, 8).half()]},
    "weight with gaps": {1: [torch.ones(3, 16)[:, ::2]]},
    "weights of two layouts": {1: [torch.ones(3, 8), torch.ones(8, 3).T]},
    "no weights": {1: []},
    "nine weights": {1: [torch.ones(3, 8)] * 9},
    "integers": {0: torch.ones(2, 8).int()},
    "turned x": {0: torch.ones(8, 2).T},
    "a number": {0: torch.tensor(1.0)},
    "bias": {2: [torch.ones(2)], 3: 1},
    "bias of another dtype": {2: [torch.ones(3).double()], 3: 1},
    "one number for a bias": {1: [torch.ones(1, 8)], 2: [torch.tensor(1.0)], 3: 1},
    "missing bias": {3: 1},
    "gain": {2: [torch.ones(7)], 3: 1 << policy.MOST_WEIGHTS},
    "norm bias": {2: [torch.ones(7)], 3: 2 << policy.MOST_WEIGHTS},
    "strided gain": {2: [torch.ones(16)[::2]], 3: 1 << policy.MOST_WEIGHTS},
    "one weight for a GLU": {7: 3},
    "unequal GLU": {1: [torch.ones(3, 8), torch.ones(4, 8)], 7: 3},
    "missing residual": {3: 4 << policy.MOST_WEIGHTS},
    "residual of another size": {2: [torch.ones(2, 4)], 3: 4 << policy.MOST_WEIGHTS},
    "residual of another dtype": {2: [torch.ones(2, 3).half()], 3: 4 << policy.MOST_WEIGHTS},
    "turned residual": {2: [torch.ones(3, 2).T], 3: 4 << policy.MOST_WEIGHTS},
    "residual of two results": {
        1: [torch.ones(3, 8)] * 2,
        2: [torch.ones(2, 6)],
        3: 4 << policy.MOST_WEIGHTS,
    },
    "norm": {4: 4},
    "activation": {1: [torch.ones(3, 8)] * 2, 7: 6},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(change):
    linear(*GOOD)
    with pytest.raises(ValueError, match="norm_linear_cpu: "):
        linear(*(change.get(i, value) for i, value in enumerate(GOOD)))


# q, k, v, mask, scale
Q, K = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 5, 8)
BAD_ATTENTION = {
    "two tokens": {0: torch.ones(2, 4, 2, 8)},
    "three axes": {0: torch.ones(2, 4, 8)},
    "dtype": {1: K.double()},
    "width": {1: torch.ones(2, 2, 5, 7)},
    "length": {2: torch.ones(2, 2, 4, 8)},
    "batch": {1: K[:1]},
    "heads": {1: torch.ones(2, 3, 5, 8), 2: torch.ones(2, 3, 5, 8)},
    "nothing": {1: K[:, :, :0], 2: K[:, :, :0]},
    "turned": {1: torch.ones(2, 2, 8, 5).mT},
    "mask": {3: [torch.ones(2, 1, 1, 4)]},
    "mask of heads": {3: [torch.ones(2, 4, 1, 5)]},
    "dtype of the mask": {3: [torch.ones(2, 1, 1, 5).half()]},
    "two masks": {3: [torch.ones(2, 1, 1, 5)] * 2},
}


@pytest.mark.parametrize("change", BAD_ATTENTION.values(), ids=BAD_ATTENTION)
def test_attention_that_does_not_fit_is_refused(change):
    good = (Q, K, K, [], 0.5)
    attend(*good)
    with pytest.raises(ValueError, match="attend_cpu: "):
        attend(*(change.get(i, value) for i, value in enumerate(good)))


def test_what_the_operator_does_not_take(monkeypatch):
    good = make((1, 16), (5,), torch.float32, gain=True)
    assert operators.takes(good)
    assert not operators.takes(make((1, 16), (5,), torch.float32, "dyt"))
    assert not operators.takes(make((1, 16), (5,), torch.float32, input_residual=True))
    added = make((2, 16), (5,), torch.float32, residual=True)
    assert operators.takes(added)
    turned = added.output_residual.T.contiguous().T
    assert not operators.takes(added._replace(output_residual=turned))
    assert not operators.takes(added._replace(output_residual=added.output_residual.half()))
    assert not operators.takes(make((1, 16), (5,), torch.float64))
    assert not operators.takes(good._replace(gain=good.gain.double()))
    assert not operators.takes(good._replace(weights=[good.weights[0].half()]))
    assert not operators.takes(good._replace(weights=[random(5, 32, dtype=torch.float32)[:, ::2]]))
    monkeypatch.setattr(operators, "AVAILABLE", False)
    assert not operators.takes(good)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_opcheck():
    x, w, vectors = torch.randn(2, 3, 8), [torch.randn(4, 8), torch.randn(5, 8)], [torch.randn(5)]
    torch.library.opcheck(linear.default, (x, w, vectors, 2, 1, 1e-5, 0.0, 0))
    q, k, mask = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.rand(2, 1, 1, 5) > 0.5
    torch.library.opcheck(attend.default, (q, k, k, [mask], 0.3))


def test_nobody_else_sees_what_is_inside():
    """It is one operation, with no other one of torch's in it that a graph could lack."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        linear(*GOOD)
    assert seen == ["flashnorm.norm_linear_cpu.default"]
