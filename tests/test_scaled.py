"""FP8 and INT8 products with the norm in the scale of the row, against float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks import scaled_errors
from flashnorm.errors import FlashNormError
from flashnorm.functional import scaled
from flashnorm.functional.scaled import FP8, INT8, QuantizedWeight, quantize_rows, quantize_weight
from flashnorm.kernels import norms, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.formats.rows import INT8_ROWS
from flashnorm.verification.bounds import CONFIDENCE, unit_roundoff
from tests.kernels.cases import random

DTYPES = {"fp8": FP8, "int8": INT8}
EVERY = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SINGLE = unit_roundoff(torch.float32)
# Roundings in float32 of one element on the way to its quantized value, and of the scales.
STEPS = 12


def arguments(norm, n, gain=False):
    options = {"norm": norm, "eps": 1e-5}
    if gain:
        options |= {"gain": random(n, dtype=torch.bfloat16, seed=3), "gain_offset": 1.0}
    if norm == "dyt":
        options["alpha"] = torch.tensor([0.4])
    return options


def normalized(x, options):
    """norm(x) ⊙ (offset + g), exact."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    kind = norms.find(wide.pop("norm"))
    return reference.normalized(Call(x.double(), (), norm=kind, **wide))


def quantized_error(exact, dtype):
    """How far from `exact` rows q ⊙ scale may be: half a step, and what precedes it in float32.

    A step of int8 is the row's largest by 127. FP8 has a relative half step of 2⁻⁴, and below its
    normal numbers, 2⁻⁶, one of 2⁻¹⁰, where 448 is the row's largest.
    """
    top = exact.abs().amax(-1, keepdim=True)
    half = top / 127 / 2 if dtype == INT8 else torch.maximum(exact.abs() / 16, top / 448 / 1024)
    n = exact.shape[-1]
    before = (STEPS + CONFIDENCE * n**0.5) * SINGLE * (exact.abs() + top)
    return half + before + 1e-38


@EVERY
@pytest.mark.parametrize("norm", norms.KINDS)
@pytest.mark.parametrize("gain", [False, True], ids=["", "gain"])
def test_rows_are_within_half_a_step_of_the_exact_norm(dtype, norm, gain):
    x = random(9, 200, dtype=torch.bfloat16, scale=3) + 1
    x[0, 0], x[1] = 500.0, x[1] * 1e-3
    options = arguments(norm, 200, gain)
    q, scale = quantize_rows(x, dtype, **options)
    assert q.dtype == dtype
    exact = normalized(x, options)
    error = (q.double() * scale.double() - exact).abs()
    assert (error <= quantized_error(exact, dtype)).all()


def bounded(x, weight, bias, options):
    """(exact results, how far from them the product may be), for rows as they are quantized."""
    q, scale = quantize_rows(x.reshape(-1, x.shape[-1]), weight.dtype, **options)
    rows, w = q.double() * scale.double(), weight.dequantized()
    exact, last = rows @ w.T, unit_roundoff(x.dtype)
    sums = CONFIDENCE * x.shape[-1] ** 0.5 * SINGLE * (rows.abs() @ w.abs().T)
    limit = sums + (last + STEPS * SINGLE) * exact.abs()
    if bias is not None:
        exact = exact + bias.double()
        limit = limit + last * (exact.abs() + limit)
    return exact, limit + torch.finfo(x.dtype).smallest_normal


@EVERY
@pytest.mark.parametrize("norm", norms.KINDS)
@pytest.mark.parametrize(("lead", "n", "k"), [((1,), 64, 48), ((2, 3), 100, 33), ((17,), 577, 96)])
def test_products_are_those_of_the_quantized_numbers(dtype, norm, lead, n, k):
    """Odd sizes too, which are filled up with zeros."""
    x = random(*lead, n, dtype=torch.bfloat16, scale=2) + 0.7
    weight = quantize_weight(random(k, n, dtype=torch.bfloat16, scale=n**-0.5), dtype)
    bias, options = random(k, dtype=torch.bfloat16, seed=7), arguments(norm, n, gain=True)
    y = scaled.scaled_norm_linear(x, weight, bias, **options)
    assert y.shape == (*lead, k)
    assert y.dtype == x.dtype
    exact, limit = bounded(x, weight, bias, options)
    assert ((y.reshape(-1, k).double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("n", [1024, 100_001])
def test_sums_of_large_int8_numbers_are_exact(n):
    """Pairs of them overflow 16 bits, and many of them the 24 bits of float32."""
    made = torch.Generator().manual_seed(n)
    q = torch.randint(100, 128, (3, n), generator=made).to(INT8)
    w = torch.randint(100, 128, (16, n), generator=made).to(INT8)
    weight = QuantizedWeight(w, INT8_ROWS, torch.ones(16, 1), 16, n)
    y = scaled.scaled_product(q, torch.ones(3, 1), weight, torch.float64)
    assert torch.equal(y, (q.long() @ w.long().T).float().double())


@EVERY
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_weight_is_quantized_by_outputs_with_its_gain_folded(dtype, offset):
    weight, gain = random(33, 100, dtype=torch.bfloat16), random(100, dtype=torch.bfloat16, seed=2)
    weight[3] *= 1000
    weight[5] = 0
    exact = weight.double() * (offset + gain.double())
    made = quantize_weight(weight, dtype, gain=gain, gain_offset=offset)
    assert made.values.shape == (48, 112)
    assert made.dtype == dtype
    error = (made.dequantized() - exact).abs()
    assert (error <= quantized_error(exact, dtype)).all()


@EVERY
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-20, 1e-3, 1e20, 1e37])
def test_no_magnitude_of_a_row_overflows_or_vanishes(dtype, norm, size):
    """ε counts where the squares of a row are far below it, and below float32's numbers."""
    x = (random(4, 64, dtype=torch.float32, seed=1) * size).bfloat16()
    options = {"norm": norm, "eps": 1e-5}
    q, scale = quantize_rows(x, dtype, **options)
    exact = normalized(x, options)
    allowed = quantized_error(exact, dtype) + 64 * 2.0**-149 / 1e-5**0.5
    assert ((q.double() * scale.double() - exact).abs() <= allowed).all()


@EVERY
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_rows_of_zeros_and_rows_that_are_not_numbers(dtype, eps):
    x = random(4, 32, dtype=torch.bfloat16)
    weight = quantize_weight(random(16, 32, dtype=torch.bfloat16), dtype)
    bias = random(16, dtype=torch.bfloat16, seed=4)
    x[1], x[2, 3], x[3, 5] = 0, float("inf"), float("nan")
    y = scaled.scaled_norm_linear(x, weight, bias, eps=eps)
    assert y[0].isfinite().all()
    assert torch.equal(y[1], bias)
    assert y[2:].isnan().all()


@EVERY
def test_no_rows_and_no_contiguous_rows(dtype):
    weight = quantize_weight(random(16, 32, dtype=torch.bfloat16), dtype)
    empty = scaled.scaled_norm_linear(torch.zeros(0, 32, dtype=torch.bfloat16), weight)
    assert empty.shape == (0, 16)
    x = random(32, 5, dtype=torch.bfloat16).T
    again = scaled.scaled_norm_linear(x.contiguous(), weight)
    assert torch.equal(scaled.scaled_norm_linear(x, weight), again)


@EVERY
def test_the_quantized_row_does_not_depend_on_the_norm(dtype):
    """q(v) = q(s v): the reason why the norm costs nothing."""
    x = random(6, 128, dtype=torch.bfloat16)
    assert torch.equal(
        quantize_rows(x, dtype)[0].float(), quantize_rows(x, dtype, norm="none")[0].float()
    )


@EVERY
@pytest.mark.parametrize("kind", scaled_errors.KINDS)
def test_the_norm_in_the_scale_errs_no_more_than_a_norm_before(dtype, kind, monkeypatch):
    """One rounding less, against float64 and for the same weights; over seeds, as it is chance."""
    monkeypatch.setattr(scaled_errors, "SEEDS", 6)
    found = scaled_errors.measure(kind, "rms", dtype)
    assert 0 < found["absorbed"] <= found["before"]
    assert found["ratio"] <= 1


def test_what_cannot_be_done_says_what_to_do():
    weight = quantize_weight(random(16, 32, dtype=torch.bfloat16))
    with pytest.raises(FlashNormError, match=r"x\.to\(torch\.bfloat16\), or use int8"):
        scaled.scaled_norm_linear(torch.zeros(2, 32), weight)
    with pytest.raises(ValueError, match="x has 33 features, the weight 32"):
        scaled.scaled_norm_linear(torch.zeros(2, 33), weight)
    with pytest.raises(FlashNormError, match=r"cannot quantize to torch\.float16"):
        quantize_weight(torch.zeros(16, 32), torch.float16)
    with pytest.raises(FlashNormError, match="not finite"):
        quantize_weight(torch.full((16, 32), torch.inf))
    there = weight._replace(values=weight.values.to("meta"))
    with pytest.raises(FlashNormError, match="x is on cpu and the weight on meta"):
        scaled.scaled_norm_linear(torch.zeros(2, 32, dtype=torch.bfloat16), there)
    with pytest.raises(ValueError, match="norm is 'batch'"):
        quantize_rows(torch.zeros(2, 32), norm="batch")


@pytest.mark.parametrize(("capability", "works"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_that_have_fp8(monkeypatch, capability, works):
    class There:
        device, dtype, is_cpu, is_cuda = torch.device("cpu"), torch.bfloat16, False, True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weight = quantize_weight(random(16, 32, dtype=torch.bfloat16))
    reason = scaled.why_not(There(), weight)
    assert (reason == "") == works
    assert works or "capability 8.6" in reason
