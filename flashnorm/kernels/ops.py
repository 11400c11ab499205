"""`torch.ops.flashnorm.norm_linear`: the operation as torch.compile, export and tracers see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashnorm.kernels import dispatch
from flashnorm.kernels.call import Call, check

NAME = "flashnorm::norm_linear"
# The fields of Call, in its order.
SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor?[] biases, str norm, float eps, Tensor? gain, "
    "float gain_offset, Tensor? norm_bias, Tensor? alpha, str? activation, Tensor? residual) "
    "-> Tensor[]"
)


def _run(*args: Any) -> list[Tensor]:
    return dispatch.norm_linear(Call(*args))


def _fake(*args: Any) -> list[Tensor]:
    call = Call(*args)
    check(call)
    made = call.weights[:1] if call.activation else call.weights
    return [call.x.new_empty((*call.x.shape[:-1], w.shape[0])) for w in made]


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        f"{NAME} has no backward; call flashnorm.functional, which runs on differentiable "
        "operations where a gradient is wanted"
    )


torch.library.define(NAME, SCHEMA, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(NAME, "CompositeExplicitAutograd", _run)
torch.library.register_fake(NAME, _fake)
torch.library.register_autograd(NAME, _no_backward)

operator = torch.ops.flashnorm.norm_linear.default


def run(call: Call) -> list[Tensor]:
    """The call through torch's dispatcher."""
    x, weights, biases, *rest = call
    return operator(x, weights, [None] * len(weights) if biases is None else biases, *rest)
