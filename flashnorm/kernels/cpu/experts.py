"""Rows of x that go to some of the matrices in one tensor, by as few calls as there can be.

Sums are in float32, biases are added to them, and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from flashnorm.kernels.cpu import calls
from flashnorm.kernels.cpu.library import load
from flashnorm.kernels.cpu.policy import MOST_WEIGHTS
from flashnorm.kernels.weights import DTYPES, dense_rows, turned

Group = tuple[int, int]


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels cannot take x [S, n] with W [E, k, n] and c [E, k], or None."""
    if isinstance(library := load(), str):
        return library
    if x.dtype not in DTYPES or not x.is_cpu:
        return f"x is {x.dtype} on {x.device}; the kernels take half precision and float32 on a CPU"
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1] or not weight.numel():
        return f"weights of {list(weight.shape)} do not fit an x of {list(x.shape)}"
    if weight.dtype != x.dtype or not weight.is_cpu:
        return f"x is {x.dtype}, the experts are {weight.dtype} on {weight.device}"
    if not (dense_rows(weight[0]) or turned(weight[0])):
        return "neither rows nor columns of an expert are dense"
    if bias is not None and not (
        bias.dtype == x.dtype and bias.is_cpu and bias.shape == weight.shape[:2]
    ):
        return f"the experts' biases are {list(bias.shape)} of {bias.dtype}"
    return "the experts' biases are not dense" if bias is not None and bias.stride(1) != 1 else None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Sequence[Group]) -> Tensor:
    """[S, k]: the next `rows` rows of x times W_eᵀ + c_e, for each (e, rows) of `groups`.

    An x of one row goes to every expert. x: [S, n], weight: [E, k, n], bias: [E, k], for which
    `why_not` has nothing against it. The numbers of experts have to be right.
    """
    x = x.contiguous()
    n, k, size = x.shape[1], weight.shape[1], x.element_size()
    y = x.new_empty((sum(rows for _, rows in groups), k))
    if x.shape[0] == 1:
        for first in range(0, len(groups), MOST_WEIGHTS):
            chosen = [e for e, _ in groups[first : first + MOST_WEIGHTS]]
            places = [y.data_ptr() + (first + i) * k * size for i in range(len(chosen))]
            segments = _segments(weight, bias, chosen)
            calls.run_at(x.dtype, n, segments, x.data_ptr(), 1, [(place, k) for place in places])
        return y
    at = 0
    for e, rows in groups:
        place, found = x.data_ptr() + at * n * size, y.data_ptr() + at * k * size
        calls.run_at(x.dtype, n, _segments(weight, bias, [e]), place, rows, [(found, k)])
        at += rows
    return y


def _segments(weight: Tensor, bias: Tensor | None, chosen: Sequence[int]) -> Iterator[int]:
    """As `calls.pack` has them for weight[e], without a tensor for each."""
    size, (far, stride, step) = weight.element_size(), weight.stride()
    if not turned(weight[0]):
        step = 1
    for e in chosen:
        yield weight.data_ptr() + e * far * size
        yield 0 if bias is None else bias.data_ptr() + e * bias.stride(0) * size
        yield from (weight.shape[1], stride, step, *calls.NO_GRIDS)
