"""Attention of one token against float64: instruction set × dtype × odd sizes × masks × strides."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from flashnorm.kernels.cpu.attention import attend, why_not
from flashnorm.kernels.cpu.library import use_isa
from tests.kernels import cases
from tests.kernels.attending import (
    GROUPS,
    INF,
    LENGTHS,
    MASKS,
    WIDTHS,
    assert_close,
    made,
    mask_of,
)
from tests.kernels.cases import DTYPES, ISAS

pytestmark = cases.compiled

NAN = float("nan")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_sizes(isa, dtype, mask):
    with use_isa(isa):
        for i, length in enumerate(LENGTHS):
            for j, heads in enumerate(GROUPS):
                batch, widths = 1 + (i + j) % 3, WIDTHS[(i + j) % len(WIDTHS)]
                q, k, v = made(batch, heads, length, widths, dtype, scale=2)
                given = mask_of(mask, batch, length, dtype)
                scale = widths[0] ** -0.5
                assert why_not(q, k, v, given) is None
                found = attend(q, k, v, scale, given)
                assert_close(q, k, v, scale, given, found, (heads, length, widths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_strides(isa, dtype):
    q, k, v = made(2, (6, 2), 40, (72, 24), dtype)
    mask = mask_of("bool", 2, 40, dtype)
    kv = (k, v)
    static = [torch.zeros(2, 2, 64, x.shape[3], dtype=dtype) for x in kv]
    for cache, x in zip(static, kv, strict=True):
        cache[:, :, 5:45] = x
    views = {
        "heads behind tokens": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in kv],
        "part of a static cache": [cache[:, :, 5:45] for cache in static],
        "part of the features": [pad(x, (3, 5))[..., 3:-5] for x in kv],
        "sequences inside": [x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in kv],
    }
    masks = {
        "dense": mask,
        "apart": mask.repeat_interleave(3, 3)[..., ::3],
        "of a longer cache": torch.cat([mask, mask], 3)[..., :40],
        "shared": mask[:1],
        "expanded": mask[:1].expand(2, 1, 1, 40),
    }
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    with use_isa(isa):
        for name, (keys, values) in views.items():
            for which, seen in masks.items():
                given = seen if which != "apart" else torch.where(seen, 0.5, -INF).to(dtype)
                assert why_not(turned, keys, values, given) is None
                found = attend(turned, keys, values, 0.1, given)
                assert_close(q, k, v, 0.1, given, found, (name, which))


@pytest.mark.parametrize("isa", ISAS)
def test_one_sequence_for_all(isa):
    q, k, v = made(3, (4, 2), 19, (20, 20), torch.float32)
    shared = [x[:1].expand(3, 2, 19, 20) for x in (k, v)]
    with use_isa(isa):
        assert_close(q, *shared, 0.3, None, attend(q, *shared, 0.3, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_huge_scores(isa, dtype):
    """Up to 10,000, both signs: nothing overflows, and weights that vanish are zero."""
    with use_isa(isa):
        for length in (3, 100):
            for scale in (150.0, -150.0):
                q, k, v = made(2, (3, 1), length, (65, 9), dtype, scale=8)
                assert_close(q, k, v, scale, None, attend(q, k, v, scale, None), (length, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_mask_of_least_numbers(isa, dtype):
    """What models add in order to hide: also where it is added everywhere, and all is even."""
    q, k, v = made(2, (4, 2), 21, (16, 16), dtype)
    mask = torch.zeros(2, 1, 1, 21, dtype=dtype)
    mask[0, ..., 7:] = mask[1] = torch.finfo(dtype).min
    expected = sdpa(q.double(), k.double(), v.double(), mask.double(), scale=1e-9, enable_gqa=True)
    with use_isa(isa):
        found = attend(q, k, v, 1e-9, mask).transpose(1, 2).double()
    assert float((found - expected).abs().max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_sequence_that_sees_nothing_is_what_torch_makes_of_it(isa, dtype):
    q, k, v = made(3, (4, 2), 50, (24, 24), dtype)
    seen = mask_of("bool", 3, 50, dtype)
    seen[1] = False
    for mask in (seen, torch.where(seen, 0.0, -INF).to(dtype)):
        theirs = sdpa(q, k, v, mask, enable_gqa=True).transpose(1, 2)
        with use_isa(isa):
            found = attend(q, k, v, 24**-0.5, mask)
        assert torch.equal(found[1], theirs[1])
        assert torch.equal(found[1], torch.zeros_like(found[1]))
        keep = torch.tensor([0, 2])
        given = (q[keep], k[keep], v[keep], 24**-0.5, mask[keep])
        assert_close(*given, found[keep])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_pass_through(isa, dtype):
    """Where torch has them, and in no other head or sequence."""
    with use_isa(isa):
        for name in ("q", "k", "v"):
            for value in (NAN, INF, -INF):
                q, k, v = made(2, (4, 2), 37, (24, 40), dtype)
                {"q": q, "k": k, "v": v}[name][1, 1, 0, 5] = value
                theirs = sdpa(q, k, v, scale=0.2, enable_gqa=True).transpose(1, 2).double()
                found = attend(q, k, v, 0.2, None).double()
                what = (name, value)
                assert torch.equal(found.isnan(), theirs.isnan()), what
                assert torch.equal(found.isinf(), theirs.isinf()), what
                finite = theirs.isfinite()
                assert torch.allclose(found[finite], theirs[finite], atol=0.02), what


@pytest.mark.parametrize("isa", ISAS)
def test_scores_that_are_all_minus_infinity(isa):
    """No mask hides anything, and no weight is left: zero, as torch has it."""
    q, _, v = made(2, (4, 2), 37, (24, 24), torch.float32)
    k = torch.full_like(v, -INF)
    theirs = sdpa(q.abs(), k, v, enable_gqa=True)
    assert torch.equal(theirs, torch.zeros_like(theirs))
    with use_isa(isa):
        assert torch.equal(attend(q.abs(), k, v, 0.2), theirs.transpose(1, 2))


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_hidden_at_the_ends_is_not_read(isa):
    q, k, v = made(2, (4, 2), 70, (24, 24), torch.float32)
    seen = torch.zeros(2, 1, 1, 70, dtype=torch.bool)
    seen[0, ..., 40:66] = seen[1, ..., 3:37] = True
    rows = (slice(40, 66), slice(3, 37))
    shown = [
        attend(q[b, None], k[b, None, :, seen_rows], v[b, None, :, seen_rows], 0.2)
        for b, seen_rows in enumerate(rows)
    ]
    hidden = ~seen.view(2, 1, 70, 1)
    with use_isa(isa):
        found = attend(q, k.masked_fill(hidden, NAN), v.masked_fill(hidden, NAN), 0.2, seen)
    assert torch.allclose(found, torch.cat(shown), atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(threads):
    before = torch.get_num_threads()
    q, k, v = made(1, (10, 5), 1000, (64, 64), torch.bfloat16)
    try:
        torch.set_num_threads(1)
        one = attend(q, k, v, 0.125)
        torch.set_num_threads(threads)
        assert torch.equal(attend(q, k, v, 0.125), one)
    finally:
        torch.set_num_threads(before)


def test_what_the_kernel_does_not_take():
    q, k, v = made(2, (4, 2), 5, (8, 8), torch.float32)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    refused = [
        ("2 tokens", (q.expand(2, 4, 1, 8).repeat(1, 1, 2, 1), k, v)),
        ("dtypes: torch.float64", (q.double(), k.double(), v.double())),
        ("dtypes: torch.float32, torch.bfloat16", (q, k.bfloat16(), v)),
        ("on the CPU", (q.to("meta"), k, v)),
        ("on the CPU", (q[0], k[0], v[0])),
        ("do not fit", (q[:1], k, v)),
        ("do not fit", (q, k[..., :4], v)),
        ("do not fit", (q, k[:, :, :3], v)),
        ("no multiple of 2", (q[:, :3], k, v)),
        ("nothing to attend to", (q, k[:, :, :0], v[:, :, :0])),
        ("not dense", (q, k.mT.contiguous().mT, v)),
        (r"the mask is \[2, 4, 1, 5\]", (q, k, v, mask.expand(2, 4, 1, 5))),
        (r"the mask is \[2, 5\]", (q, k, v, mask[:, 0, 0])),
        (r"the mask is \[2, 1, 1, 4\]", (q, k, v, mask[..., :4])),
        ("the mask is torch.float64", (q, k, v, mask.double())),
    ]
    for message, given in refused:
        assert re.search(message, why_not(*given) or ""), (message, why_not(*given))
    assert why_not(q, k, v, mask) is None
    assert why_not(q[..., :1], k[..., 3:4], v) is None


@pytest.mark.parametrize("length", [512, 513, 1024, 2100])
@pytest.mark.parametrize("isa", ISAS)
def test_pieces_are_joined_to_the_whole(isa, length):
    """Scores that differ much between pieces, pieces that a mask hides, and none to be seen."""
    q, k, v = made(2, (6, 2), length, (33, 70), torch.float32, scale=3)
    k[:, :, : length // 2] *= 4
    seen = torch.rand(2, 1, 1, length) > 0.3
    seen[0, ..., : length // 4] = seen[1, ..., length // 3 :] = False
    for mask in (None, seen):
        assert_close(q, k, v, 0.2, mask, attended(isa, q, k, v, 0.2, mask), (length, mask))
    seen[0] = False
    assert not attended(isa, q, k, v, 0.2, seen)[0].any()
    k[1, 0, length - 1, 0] = NAN
    assert attended(isa, q, k, v, 0.2, None)[1, 0, :3].isnan().all()
    k[0, 0, 0, 0] = INF
    q[0, 0, 0, 0] = 1.0
    assert attended(isa, q, k, v, 0.2, None)[0, 0, 0].isnan().all()


def attended(isa, q, k, v, scale, mask):
    with use_isa(isa):
        return attend(q, k, v, scale, mask)


def test_no_bit_depends_on_the_number_of_threads():
    q, k, v = made(2, (6, 3), 3000, (64, 64), torch.float32)
    seen = torch.rand(2, 1, 1, 3000) > 0.3
    before = torch.get_num_threads()
    try:
        for mask in (None, seen):
            torch.set_num_threads(1)
            expected = attend(q, k, v, 0.125, mask)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                for _ in range(10):
                    assert torch.equal(attend(q, k, v, 0.125, mask), expected)
    finally:
        torch.set_num_threads(before)
