"""`torch.ops.flashnorm.norm_linear`: the operation as torch.compile, export and tracers see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashnorm.compat.torch_names import after_autograd, below_autograd
from flashnorm.errors import FlashNormError
from flashnorm.kernels import autograd, dispatch, norms
from flashnorm.kernels.call import Call, check
from flashnorm.kernels.weights import packed

NAME = "flashnorm::norm_linear"
# The fields of Call, in its order; weights are dense, and a norm is given by its name.
SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor?[] biases, str norm, float eps, Tensor? gain, "
    "float gain_offset, Tensor? norm_bias, Tensor? alpha, str? activation, "
    "Tensor? output_residual, Tensor? input_residual) "
    "-> Tensor[]"
)


def _run(*args: Any) -> list[Tensor]:
    # Dense, as compiled graphs are told (`_fake`): what is beside others in a product is not.
    return [y.contiguous() for y in dispatch.norm_linear(_call(args))]


def _call(args: Sequence[Any]) -> Call:
    x, weights, biases, norm, *rest = args
    return Call(x, weights, biases, norms.find(norm), *rest)


def _fake(*args: Any) -> list[Tensor]:
    call = _call(args)
    check(call)
    return [call.x.new_empty((*call.x.shape[:-1], w.shape[0])) for w in call.results()]


def _differentiate(keyset: Any, *args: Any) -> list[Tensor]:
    """The kernel of the Autograd key. (register_autograd cannot take `Tensor?[]` with a None.)"""
    call, below = _call(args), partial(_below_autograd, keyset)
    return autograd.run(call, below) if call.needs_gradient() else below(call)


def _below_autograd(keyset: Any, call: Call) -> list[Tensor]:
    with below_autograd():
        rest = keyset & after_autograd
        return operator.redispatch(rest, *_arguments(call))


def _arguments(call: Call) -> tuple[Any, ...]:
    x, weights, biases, norm, *rest = call
    biases = [None] * len(weights) if biases is None else list(biases)
    return (x, list(weights), biases, norm.name, *rest)


torch.library.define(NAME, SCHEMA, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(NAME, "CompositeExplicitAutograd", _run)
torch.library.register_fake(NAME, _fake)
_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.impl("norm_linear", _differentiate, "Autograd", with_keyset=True)

operator = torch.ops.flashnorm.norm_linear.default
PACKED = (
    "packed weights have no place in the operator that compiled graphs and tracers see; there the "
    "module's own code runs"
)


def run(call: Call) -> list[Tensor]:
    """The call through torch's dispatcher: with its gradient, and seen by whoever watches.

    Raises FlashNormError for packed weights.
    """
    if packed(call.weights):
        raise FlashNormError(PACKED)
    return operator(*_arguments(call))
