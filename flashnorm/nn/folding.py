"""The gain and the bias of a norm into the readers of one module (E1, E2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashnorm import algebra
from flashnorm.errors import FoldError
from flashnorm.plan import Gain, Span


@torch.no_grad()
def fold_readers_(
    module: nn.Module, readers: Sequence[tuple[str, str]], gain_offset: float
) -> None:
    """`W* = W diag(gain_offset + gain)` and `c* = c + W β` for (weight, bias) names of `module`.

    `gain` and `norm_bias` of the module become None. Raises FoldError before anything is written.
    """
    held = _own_parameters(module, readers)
    biases = {bias: _new_bias(held, weight, bias) for weight, bias in readers}
    if held["gain"] is not None:
        _fold_gain_(held, [weight for weight, _ in readers], gain_offset)
    for name, value in biases.items():
        _set_bias_(module, name, value)
    module.register_parameter("gain", None)
    module.register_parameter("norm_bias", None)


def _own_parameters(
    module: nn.Module, readers: Sequence[tuple[str, str]]
) -> dict[str, Tensor | None]:
    names = [name for pair in readers for name in pair] + ["gain", "norm_bias"]
    held: dict[str, Tensor | None] = {}
    for name in names:
        if name not in module._parameters:
            raise FoldError(
                f"{name} is not a parameter of the module itself (parametrized?); remove that first"
            )
        held[name] = module._parameters[name]
    return held


def _new_bias(held: dict[str, Tensor | None], weight_name: str, name: str) -> Tensor | None:
    """`c + W β` where the norm has a bias β, else c."""
    weight, bias, norm_bias = held[weight_name], held[name], held["norm_bias"]
    if norm_bias is None or weight is None:
        return bias
    made = weight.new_zeros(weight.shape[0]) if bias is None else bias.clone()
    algebra.fold_bias_(made, algebra.bias_product(weight, norm_bias, 1, _all(norm_bias)))
    if not bool(torch.isfinite(made).all()):
        raise FoldError(f"{name}: adding W β to it gives no finite {made.dtype}; use a wider dtype")
    return made


def _fold_gain_(held: dict[str, Tensor | None], names: Sequence[str], offset: float) -> None:
    parameter = held["gain"]
    assert parameter is not None
    gain = algebra.effective_gain(parameter, Gain("gain", offset))
    lost = 0
    for name in names:
        lost += algebra.check_fold(name, _weight(held, name), "gain", gain, 1, _all(gain))
    for name in names:
        algebra.fold_gain_(_weight(held, name), gain, 1, _all(gain))
    if lost:
        warnings.warn(algebra.subnormal_warning(lost), stacklevel=4)


def _weight(held: dict[str, Tensor | None], name: str) -> Tensor:
    weight = held[name]
    assert weight is not None
    return weight


def _all(vector: Tensor) -> tuple[Span, ...]:
    return (Span(0, 0, vector.numel()),)


def _set_bias_(module: nn.Module, name: str, value: Tensor | None) -> None:
    before = module._parameters[name]
    if value is None or value is before:
        return
    if before is None:
        module.register_parameter(name, nn.Parameter(value))
    else:
        before.copy_(value)
