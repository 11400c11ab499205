"""What a norm is in eager calls on a GPU: few of PyTorch's operations, here on the CPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashnorm.kernels import norms
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import policy

N = 64
MAKES_NOTHING = ("view", "empty_like")


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ not in MAKES_NOTHING:
            self.made.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(1,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_dynamic_tanh_takes_four_operations_and_one_rounding(dtype, shape, turned):
    torch.manual_seed(0)
    x = torch.randn(3, N).to(dtype)
    x = torch.randn(N, 3).to(dtype).T if turned else x
    gain, bias = torch.randn(2, N).to(dtype)
    alpha = torch.randn(shape).to(dtype)
    call = Call(x, (), None, norms.DYT, 0.0, gain, 0.0, bias, alpha)
    with Counting() as counting:
        found = policy.normalized(call)
    assert len(counting.made) <= 4, counting.made
    assert found.dtype == dtype
    assert found.is_contiguous()
    truth = torch.tanh(alpha.double() * x.double()) * gain.double() + bias.double()
    # αx, tanh (of two units), γ ⊙ and the sum are rounded in float32, and the result once.
    once, wide = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    limit = once * truth.abs() + 6 * wide * (gain.double().abs() + bias.double().abs())
    assert ((found.double() - truth).abs() <= limit).all()
