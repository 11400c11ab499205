"""Norm + linear in FP8 and INT8 with a scale per row, in which the norm is absorbed.

    y = (a · s) ⊙ (q W_qᵀ) ⊙ b + c,  q = round(v / a),  a = max|v| / largest,  v = x ⊙ (offset + g)

x: [.., n], v in float32; q and W_q: float8_e4m3fn or int8; a and s: one number per row, b: one per
output. What is rounded does not change when a row is multiplied by a number, `q(v) = q(s v)`: so
the norm's s need not be applied before. The normalized row is never rounded to the dtype of x, nor
written. For a LayerNorm v is `x − μ`, and not corrected by `μ u` behind the product: a mean far
above the deviation would take all of q's few digits. DyT has v = tanh(αx) and s = 1.

A gain is folded into the weight before that is quantized (E1: `quantize_weight`), or is applied to
x on load, as above, where one weight serves several gains or stays untouched. A norm's own bias
has to be folded into c (E2): it has no place under a scale of the row.
Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.compat.torch_names import int_mm, scaled_mm
from flashnorm.errors import FlashNormError
from flashnorm.kernels import norms
from flashnorm.kernels.formats.rows import FP8_ROWS, INT8_ROWS
from flashnorm.kernels.norms import NormKind
from flashnorm.kernels.weights import FP8, INT8, LARGEST
from flashnorm.kernels.weights import Weight as QuantizedWeight

MULTIPLE = 16  # of both sides of a weight, as the products on GPUs ask for
LEAST_ROWS = 32  # of an int8 product on a GPU, which takes more than 16
EXACT_PRODUCTS = 1024  # of two int8 numbers, whose sum is below 2²⁴: float32 holds it
FP8_CAPABILITY, INT8_CAPABILITY = (8, 9), (8, 0)


def quantize_weight(
    weight: Tensor,
    dtype: torch.dtype = FP8,
    *,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
) -> QuantizedWeight:
    """A weight [k, n] with one scale per output, `max|W_j ⊙ (offset + g)| / largest`.

    weight: [k, n], any floating dtype; gain: [n], folded into W first (E1), in float32. dtype:
    torch.float8_e4m3fn or torch.int8. Raises FlashNormError for another dtype and for values that
    are not finite, RuntimeError for a gain that does not fit.
    """
    _check_dtype(dtype)
    wide = weight.detach().float()
    if gain is not None:
        wide = wide * (gain_offset + gain.detach().float())
    if not wide.isfinite().all():
        raise FlashNormError("the weight has values that are not finite; they cannot be quantized")
    values, scale = _quantized(wide, dtype)
    k, n = weight.shape
    padded = F.pad(values.view(torch.uint8), (0, -n % MULTIPLE, 0, -k % MULTIPLE)).view(dtype)
    scales = F.pad(scale, (0, 0, 0, -k % MULTIPLE))
    return QuantizedWeight(padded, FP8_ROWS if dtype == FP8 else INT8_ROWS, scales, k, n)


def quantize_rows(
    x: Tensor,
    dtype: torch.dtype = FP8,
    *,
    norm: str = norms.RMS.name,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(q [.., n], a · s [.., 1]) of x [.., n], so that `norm(x) ⊙ (offset + g) ≈ q ⊙ (a · s)`.

    s is `rsqrt(mean(x²) + ε)` or of the variance. A row that is all zeros has scale 0; one with an
    infinity or NaN has scale NaN. Nothing overflows or vanishes on the way, in any floating dtype
    of x. q has `dtype`, torch.float8_e4m3fn or torch.int8, the scales are float32; gain: [n];
    alpha: one number, read by "dyt" alone. Raises FlashNormError for another dtype and for norms
    without a kernel, ValueError for an unknown norm, RuntimeError for a gain that does not fit.
    """
    _check_dtype(dtype)
    kind = _kind(norm)
    rows = _divided_by_norm(x, kind, alpha)
    top = rows.abs().amax(-1, keepdim=True)
    unit = _divided(rows, top)  # within [−1, 1], whatever the rows are
    factor = _norm_scale(unit, top, eps) if kind.scales else top
    if gain is not None:
        unit = unit * (gain_offset + gain.float())
    values, scale = _quantized(unit, dtype)
    return values, scale * factor


def scaled_norm_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    norm: str = norms.RMS.name,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    alpha: Tensor | None = None,
) -> Tensor:
    """`(norm(x) ⊙ (offset + g)) Wᵀ + c` with x quantized by rows and the norm in their scale.

    x: [.., n], bfloat16 for FP8 weights (as the products of torch ask), any floating dtype for
    int8; weight: [k, n] of `quantize_weight`; bias: [k], gain: [n]; returns [.., k] in the dtype of
    x. Runs on the CPU and on NVIDIA GPUs of capability 8.9 (FP8) or 8.0 (int8) and later. Raises
    FlashNormError elsewhere (`why_not`), ValueError for an x of another width and an unknown norm,
    RuntimeError for a bias or gain that does not fit.
    """
    if x.shape[-1] != weight.features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight {weight.features}")
    if reason := why_not(x, weight):
        raise FlashNormError(reason)
    flat = x.reshape(-1, x.shape[-1])
    q, scale = quantize_rows(
        flat,
        weight.dtype,
        norm=norm,
        eps=eps,
        gain=gain,
        gain_offset=gain_offset,
        alpha=alpha,
    )
    y = scaled_product(q, scale, weight, x.dtype)
    y = y if bias is None else (y.float() + bias.float()).to(x.dtype)
    return y.reshape(*x.shape[:-1], weight.outputs)


def scaled_product(q: Tensor, scale: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`scale ⊙ (q W_qᵀ) ⊙ b`: q [M, n] and scale [M, 1] of `quantize_rows`; [M, k] in `dtype`."""
    if not q.is_cuda:
        return _cpu_product(q, scale, weight, dtype)
    product = _fp8_product if weight.dtype == FP8 else _int8_product
    y = product(_filled(q, weight), scale, weight, dtype)
    return y[: q.shape[0], : weight.outputs]


def why_not(x: Tensor, weight: QuantizedWeight) -> str:
    """Why `scaled_norm_linear` cannot take them, and what to do instead; empty where it can."""
    if x.device != weight.values.device:
        return f"x is on {x.device} and the weight on {weight.values.device}; move one of them"
    if weight.dtype == FP8 and x.dtype != torch.bfloat16:
        return f"x is {x.dtype}; FP8 products give bfloat16: x.to(torch.bfloat16), or use int8"
    if x.is_cpu:
        return ""
    if not x.is_cuda or torch.version.hip is not None:
        return f"x is on {x.device}; row-scaled products run on CPUs and on NVIDIA GPUs"
    found, needed = torch.cuda.get_device_capability(x.device), INT8_CAPABILITY
    if weight.dtype == FP8:
        needed = FP8_CAPABILITY
    if found >= needed:
        return ""
    return (
        f"the GPU has capability {found[0]}.{found[1]}; {weight.dtype} products need "
        f"{needed[0]}.{needed[1]}: use the functions of flashnorm.functional on the whole weight"
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in LARGEST:
        raise FlashNormError(f"cannot quantize to {dtype}; the dtypes are {FP8} and {INT8}")


def _kind(norm: str) -> NormKind:
    kind = norms.find(norm)
    if kind.code is None:
        raise FlashNormError(f"rows cannot be quantized behind the norm {norm!r}")
    return kind


def _divided_by_norm(x: Tensor, kind: NormKind, alpha: Tensor | None) -> Tensor:
    """What the norm divides: x or x − μ; where it divides nothing, x̂; float32."""
    wide = x.float()
    if kind.scales:
        return wide - wide.mean(-1, keepdim=True) if kind.centers else wide
    return kind.hat(wide, None, None, alpha)


def _divided(rows: Tensor, top: Tensor) -> Tensor:
    """rows / top, and 0 where the row is all zeros."""
    return rows / torch.where(top == 0, 1.0, top)


def _norm_scale(unit: Tensor, top: Tensor, eps: float) -> Tensor:
    """`top · rsqrt(mean((top · unit)²) + ε)` without squares of anything but `unit`."""
    spread = unit.square().mean(-1, keepdim=True).sqrt()
    scale = top / torch.hypot(top * spread, torch.full_like(top, eps**0.5))
    return torch.where(top == 0, 0.0, scale)


def _quantized(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values in dtype, `max|row| / largest`), of rows [.., n] in float32."""
    top, largest = rows.abs().amax(-1, keepdim=True), LARGEST[dtype]
    values = _divided(rows, top) * largest
    values = values.round().nan_to_num(0.0) if dtype == INT8 else values
    return values.to(dtype), top / largest


def _cpu_product(q: Tensor, scale: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The sums of so few products that float32 holds those of int8 exactly, whoever adds them.

    The library's own products are not to be had on every processor: without VNNI those of int8
    add pairs in 16 bits, which overflow in silence, and those of FP8 do not exist.
    """
    found = torch.zeros(q.shape[0], weight.outputs, dtype=torch.float64)
    for first in range(0, weight.features, EXACT_PRODUCTS):
        some = slice(first, min(first + EXACT_PRODUCTS, weight.features))
        found += q[:, some].float() @ weight.values[: weight.outputs, some].float().T
    return (found.float() * scale * _scales(weight)[: weight.outputs].T).to(dtype)


def _scales(weight: QuantizedWeight) -> Tensor:
    if weight.scales is None or weight.zeros is not None or weight.group:
        raise FlashNormError("a row-scaled product needs a weight with one scale per output alone")
    return weight.scales


def _filled(q: Tensor, weight: QuantizedWeight) -> Tensor:
    """q [M, n] with the columns, and for int8 the rows, that a product on a GPU asks for."""
    columns = weight.values.shape[1] - q.shape[1]
    rows = max(0, LEAST_ROWS - q.shape[0]) if q.dtype == INT8 else 0
    if not (rows or columns):
        return q
    return F.pad(q.view(torch.uint8), (0, columns, 0, rows)).view(q.dtype)


def _fp8_product(q: Tensor, scale: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return scaled_mm(
        q, weight.values.t(), scale_a=scale, scale_b=_scales(weight).t(), out_dtype=dtype
    )


def _int8_product(q: Tensor, scale: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Sums of integers are exact; they are scaled in float32 and rounded once."""
    found = int_mm(q, weight.values.t())[: scale.shape[0]]
    return (found.float() * scale * _scales(weight).t()).to(dtype)
