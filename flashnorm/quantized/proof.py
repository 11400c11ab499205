"""What a layout says of a module, held against what the module itself computes.

    y = x Wᵀ + c,  W dequantized in float64

x are single features, which show W column by column in every place of a word of eight, and random
rows, one with an outlier, which show that x is not rounded. The module may round as a module does:
a weight three times in the coarser of its dtypes (scale, product, cast), a sum of n products in
float32, and its result three times in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from flashnorm.kernels.weights import Weight, part

OTHER = (
    "what it computes in {} is not what its packed weight says (off by {:.1e} of {:.1e} allowed): "
    "it runs its own code"
)
FAILED = "its own code does not run in {} ({}), so that nothing can be held against it"
RETURNS = "in {} it returns {} of {}, not x Wᵀ + c in the dtype of x"
EACH = 8  # features in a word, the largest unit that layouts are made of
SINGLE, RANDOM = 3 * EACH, 4  # rows of x
OUTLIER = 100.0
OUTPUTS = 256  # at most, of each of three stretches
ROUNDINGS = 3
CONFIDENCE = 4.0  # λ of verification.bounds, which this layer cannot import


def why_not(
    weight: Weight,
    bias: Tensor | None,
    forward: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    coarse: torch.dtype | None = None,
    rounds: torch.dtype | None = None,
) -> str:
    """Why `forward` is not `x Wᵀ + c` for x of a dtype; empty where it is.

    coarse: a dtype of the module's, which its weights may be rounded to; rounds: one that all that
    it multiplies and returns is rounded to. Any error of the module's code is a reason.
    """
    x, chosen = _probes(weight.features, weight.values.device)
    x = x.to(dtype)
    try:
        with torch.inference_mode(False), torch.no_grad():
            made = [forward(x), forward(x[-1:])]
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return FAILED.format(dtype, f"{type(error).__name__}: {line}")
    for y, rows in zip(made, (x.shape[0], 1), strict=True):
        if y.dtype != dtype or y.shape != (rows, weight.outputs):
            return RETURNS.format(dtype, list(y.shape), y.dtype)
    y = torch.cat(made).double()
    x = torch.cat([x, x[-1:]]).double()
    u = max(_roundoff(d) for d in (dtype, rounds) if d is not None)
    stored = max(_roundoff(d) for d in (dtype, rounds, coarse) if d is not None)
    return _compare(weight, bias, x, y, len(chosen), u, stored, dtype)


def _probes(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [SINGLE + RANDOM, n], and the features that the first rows are one of."""
    generator = torch.Generator().manual_seed(n)
    words = torch.randint(0, -(-n // EACH), (SINGLE,), generator=generator)
    chosen = (words * EACH + torch.arange(SINGLE) % EACH).clamp(max=n - 1)
    x = torch.zeros(SINGLE + RANDOM, n, dtype=torch.float64)
    x[torch.arange(SINGLE), chosen] = 1.0
    x[SINGLE:] = torch.randn(RANDOM, n, generator=generator, dtype=torch.float64)
    x[SINGLE, n // 2] = OUTLIER
    return x.to(device), chosen


def _stretches(outputs: int) -> list[tuple[int, int]]:
    """(start, length) of the outputs looked at: the first, some in the middle, the last."""
    if outputs <= 3 * OUTPUTS:
        return [(0, outputs)]
    middle = outputs // 2 // EACH * EACH
    last = (outputs - OUTPUTS) // EACH * EACH
    return [(0, OUTPUTS), (middle, OUTPUTS), (last, outputs - last)]


def _compare(
    weight: Weight,
    bias: Tensor | None,
    x: Tensor,
    y: Tensor,
    single: int,
    u: float,
    stored: float,
    dtype: torch.dtype,
) -> str:
    """Why y is not `x Wᵀ + c`, up to roundings by u of x and y and by `stored` of W."""
    for start, length in _stretches(weight.outputs):
        w = part(weight, start, length).dequantized()
        c = 0.0 if bias is None else bias[start : start + length].detach().double()
        found, exact = y[:, start : start + length], x @ w.T + c
        size = exact.abs() + (c.abs() if isinstance(c, Tensor) else c)
        spread = (x.square() @ w.square().T).sqrt()
        sums = sqrt(weight.features) * _roundoff(torch.float32) * (x.abs() @ w.abs().T)
        moved = (ROUNDINGS * stored + u) * spread
        bound = CONFIDENCE * (moved + sums) + ROUNDINGS * u * size
        rows = slice(single)  # of one feature: nothing is summed, and x is 0 or 1
        bound[rows] = ROUNDINGS * (stored * spread[rows] + u * size[rows]) * (1 + 4 * stored)
        bound += torch.finfo(dtype).smallest_normal
        off = (found - exact).abs()
        if not bool((off <= bound).all()):
            worst = int((off - bound).nan_to_num(torch.inf).argmax())
            return OTHER.format(dtype, float(off.flatten()[worst]), float(bound.flatten()[worst]))
    return ""


def _roundoff(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps) / 2
