"""Properties of the fold that both routes, memory and disk, rely on."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashnorm import FoldError, Gain, Span, algebra, fold_checkpoint
from flashnorm.checkpoint import blocks
from flashnorm.plan import Consumer, Plan, Site

from .helpers import load, write_checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@st.composite
def folds(draw, dtypes=DTYPES, spread=0.3):
    """A weight, a gain, the axis and the spans along it: odd shapes, parts of the axis only."""
    ndim = draw(st.integers(1, 3))
    axis = draw(st.integers(0, ndim - 1))
    shape = [draw(st.integers(1, 9)) for _ in range(ndim)]
    width = shape[axis]
    cuts = sorted(draw(st.sets(st.integers(0, width), max_size=4)) | {0, width})
    spans = tuple(
        Span(a, draw(st.integers(0, 5)), b - a) for a, b in pairwise(cuts) if draw(st.booleans())
    )
    dtype = draw(st.sampled_from(dtypes))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)
    gain = Gain("g", *draw(st.sampled_from([(0.0, 1.0), (1.0, 1.0), (0.0, 2.0)])))
    raw = spread * torch.randn(width + 5, generator=rng, dtype=torch.float64)
    parameter = ((1 + raw - gain.offset) / gain.scale).to(dtype)
    return weight, parameter, gain, axis, spans


@settings(max_examples=200, deadline=None)
@given(folds())
def test_unfold_gives_the_weights_back_within_one_rounding(case):
    """fl(fl(w·g)/g) = w(1 + δ₁)(1 + δ₂) with |δᵢ| ≤ u, the unit roundoff of the weight's dtype, as
    long as w·g stays normal; the wider type adds two roundings that are 2⁻¹³ u or less for 16-bit
    weights, and are counted in full for the others. Below the smallest normal number the error
    of the product is absolute, half of `tiny · 2u`, and the division makes it 1/|g| of that."""
    weight, parameter, gain, axis, spans = case
    g = algebra.effective_gain(parameter, gain)
    g = torch.where(g == 0, torch.ones_like(g), g)
    again = weight.clone()
    algebra.fold_gain_(again, g, axis, spans)
    folded = again.clone()
    algebra.unfold_gain_(again, g, axis, spans)
    info = torch.finfo(weight.dtype)
    u, roundings = info.eps / 2, 2 if weight.element_size() == 2 else 4
    bound = (roundings * u * (1 + 4 * u)) * weight.double().abs() + 2 * u * info.tiny * (
        1 + 1 / float(g.abs().min())
    )
    assert bool(((again.double() - weight.double()).abs() <= bound).all())
    touched = torch.zeros(weight.shape[axis], dtype=torch.bool)
    for span in spans:
        touched[span.start : span.start + span.length] = True
    rest = (~touched).nonzero().flatten()
    assert torch.equal(folded.index_select(axis, rest), weight.index_select(axis, rest))


@settings(max_examples=200, deadline=None)
@given(folds())
def test_the_fold_is_the_product_rounded_once(case):
    """Against plain float64 arithmetic; a 16-bit weight has no other correct value."""
    weight, parameter, gain, axis, spans = case
    g = algebra.effective_gain(parameter, gain)
    wanted = weight.double().movedim(axis, -1).clone()
    for s in spans:
        part = g[s.gain_start : s.gain_start + s.length].double()
        wanted[..., s.start : s.start + s.length] *= part
    wanted = wanted.movedim(-1, axis)
    algebra.fold_gain_(weight, g, axis, spans)
    if weight.element_size() == 2 and g.dtype == torch.float32:
        wanted = wanted.to(weight.dtype).double()
        assert torch.equal(weight.double(), wanted)
    else:  # a second rounding in the wider dtype may turn a tie
        torch.testing.assert_close(
            weight.double(), wanted, rtol=torch.finfo(weight.dtype).eps, atol=0
        )


EXTREMES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from([65504.0, 6.1e-5, 6.0e-8, 3.3e38, 1.2e-38, 1e-45, -3e4, 2.0**-14]),
    st.floats(width=32),
)


@settings(max_examples=400, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    values=st.lists(EXTREMES, min_size=1, max_size=12),
    gains=st.lists(
        st.one_of(
            st.sampled_from([0.0, 1.0, -284.0, 1e-6, 0.5, 2.0**-30, 1e38]),
            st.floats(-300, 300, width=32),
        ),
        min_size=12,
        max_size=12,
    ),
)
@example(torch.float16, [6.2e-5, 1.0], [0.5] * 12)
@example(torch.float16, [3e4], [-284.0] * 12)
@example(torch.bfloat16, [float("nan"), 3.3e38], [1.01, 1.01] + [1.0] * 10)
def test_check_fold_counts_what_plain_arithmetic_counts(dtype, values, gains):
    weight = torch.tensor([values], dtype=torch.float64).to(dtype)
    g = torch.tensor(gains[: len(values)], dtype=torch.float32)
    wide = weight.to(torch.promote_types(dtype, torch.float32))
    after = (wide * g).to(dtype)
    tiny = torch.finfo(dtype).tiny
    spans = (Span(0, 0, len(values)),)
    if bool((wide.isfinite() & ~after.isfinite()).any()):
        with pytest.raises(FoldError, match="overflows"):
            algebra.check_fold("w", weight, "g", g, 1, spans)
        return
    lost = (wide.abs() >= tiny) & (after.to(wide.dtype).abs() < tiny) & (g != 0)
    assert algebra.check_fold("w", weight, "g", g, 1, spans) == int(lost.sum())


@settings(max_examples=60, deadline=None)
@given(first=folds(), block=st.sampled_from([1, 16, 40, 256]), data=st.data())
def test_blocks_on_disk_equal_the_tensor_in_memory(tmp_path_factory, first, block, data):
    """Any shape, axis and spans, two gains on one tensor, cut into blocks of any size."""
    weight, parameter, gain, axis, spans = first
    axes = [axis, data.draw(st.integers(0, weight.ndim - 1))]
    full = (Span(0, 0, weight.shape[axes[1]]),)
    second = Gain("h")
    h = torch.linspace(0.5, 1.5, weight.shape[axes[1]]).to(weight.dtype)
    consumers = [Consumer("w", axes[0], spans), Consumer("w", axes[1], full)]
    plan = Plan(
        tuple(
            Site(str(i), "rms", 4, 1e-6, "folded", "", (consumer,), one)
            for i, (one, consumer) in enumerate(zip((gain, second), consumers, strict=True))
        )
    )
    tmp_path = tmp_path_factory.mktemp("blocks")
    tensors = {"a": torch.ones(3), "w": weight.clone(), "g": parameter, "h": h}
    src = write_checkpoint(tmp_path / "src", tensors)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(blocks, "FOLD_BYTES", block)
        patch.setattr(blocks, "COPY_BYTES", block)
        fold_checkpoint(src, tmp_path / "dst", plan=plan)
    algebra.fold_gain_(weight, algebra.effective_gain(parameter, gain), axes[0], spans)
    algebra.fold_gain_(weight, algebra.effective_gain(h, second), axes[1], full)
    after = load(tmp_path / "dst")
    assert torch.equal(after["w"], weight)
    assert torch.equal(after["a"], tensors["a"])
    assert bool((algebra.effective_gain(after["g"], gain) == 1).all())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.integers(0, 70), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_sums_have_one_order_whatever_the_blocks(rows, n, dtype, seed):
    """Row by row, in blocks or at once, transposed or not: the same bits, and the right ones."""
    rng = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, n, generator=rng).to(dtype)
    vector = torch.randn(n, generator=rng, dtype=torch.float64)
    found = algebra.matrix_vector(matrix, vector)
    assert torch.equal(algebra.matrix_vector(matrix.t().contiguous().t(), vector), found)
    for i in range(rows):
        assert torch.equal(algebra.matrix_vector(matrix[i : i + 1], vector), found[i : i + 1])
        exact = math.fsum(a * b for a, b in zip(matrix[i].tolist(), vector.tolist(), strict=True))
        size = float((matrix[i].double() * vector).abs().sum())
        # One rounding of each product, and one in each of the levels of the tree of sums.
        levels = 1 + math.ceil(math.log2(max(1, n)))
        assert abs(float(found[i]) - exact) <= levels * 2.0**-53 * (1 + 1e-9) * size


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mean_does_not_depend_on_the_blocks(axis, monkeypatch):
    weight = torch.randn(5, 37, 23, dtype=torch.float64)
    at_once = weight.clone()
    algebra.center_(at_once, axis)
    assert float(at_once.mean(axis).abs().max()) < 37 * 2.0**-53
    for elements in (1, 100, 23 * 37):
        monkeypatch.setattr(algebra, "BLOCK_ELEMENTS", elements)
        parts = weight.clone()
        algebra.center_(parts, axis)
        assert torch.equal(parts, at_once)
