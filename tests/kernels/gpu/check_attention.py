"""Attention of one new token on the GPU's kernel: sizes, masks, strides, what is read, and when."""

from __future__ import annotations

import itertools
import random as chance
import re
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from flashnorm.kernels.gpu import attention, counters
from flashnorm.kernels.gpu.launch import HOPPER, Device, device_of
from flashnorm.kernels.gpu.step import execute
from tests.kernels.attending import INF, LOST, MASKS, assert_close, made, mask_of
from tests.kernels.cases import DTYPES
from tests.kernels.gpu.calls import DEVICE, interpreted, on_device, permuted

NAN = float("nan")
HEADS = ((3, 3), (4, 2), (8, 2), (7, 1), (19, 1))  # heads, kv heads; 19 are two programs
WIDTHS = ((64, 64), (33, 7), (1, 1), (80, 96), (20, 260))  # of k, of v


def attend(q, k, v, scale, mask=None, splits=None):
    """On the device, in so many parts, with a result on the CPU."""
    q, k, v, mask = on_device([q, k, v, mask])
    assert attention.unfit(q, k, v, mask) is None
    out = torch.full((q.shape[0], 1, q.shape[1], v.shape[3]), NAN, dtype=q.dtype, device=DEVICE)
    execute([attention.attention_step(q, k, v, mask, scale, out, device_of(q), splits)])
    return out.cpu()


def check(q, k, v, scale, mask, found, what=()):
    assert_close(q, k, v, scale, mask, found, what, **LOST[q.dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, mask):
    for i, length in enumerate((1, 17, 300)):
        for j, heads in enumerate(HEADS):
            batch, widths = 1 + (i + j) % 3, WIDTHS[(i + j) % len(WIDTHS)]
            q, k, v = made(batch, heads, length, widths, dtype, scale=2)
            given, scale = mask_of(mask, batch, length, dtype), widths[0] ** -0.5
            for splits in (None, 1) if length == 300 else (None,):
                found = attend(q, k, v, scale, given, splits)
                check(q, k, v, scale, given, found, (heads, length, widths, splits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_that_are_multiplied_in_parts(dtype):
    """512 of them: more than a tile of k has, of q and k alike."""
    for width, heads in itertools.product((300, 512), ((2, 1), (1, 1))):
        q, k, v = made(1, heads, 40, (width, width), dtype, scale=2)
        check(q, k, v, width**-0.5, None, attend(q, k, v, width**-0.5), (width, heads))


@pytest.mark.parametrize("heads", [(6, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, heads):
    q, k, v = made(2, heads, 40, (72, 24), dtype)
    mask = mask_of("bool", 2, 40, dtype)
    kv = (k, v)
    static = [torch.full((2, 2, 64, x.shape[3]), NAN, dtype=dtype) for x in kv]
    for cache, x in zip(static, kv, strict=True):
        cache[:, :, 5:45] = x
    views = {
        "heads behind tokens": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in kv],
        "part of a longer cache": [cache[:, :, 5:45] for cache in static],
        "part of the features": [pad(x, (3, 5), value=NAN)[..., 3:-5] for x in kv],
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
    for name, (keys, values) in views.items():
        for which, seen in masks.items():
            given = seen if which != "apart" else torch.where(seen, 0.5, -INF).to(dtype)
            found = attend(turned, keys, values, 0.1, given)
            check(q, k, v, 0.1, given, found, (name, which))
    shared = [x[:1].expand(2, -1, -1, -1) for x in kv]
    check(q, *shared, 0.3, None, attend(q, *shared, 0.3), "one sequence for all")


@pytest.mark.parametrize("heads", [(3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_scores(dtype, heads):
    """Up to 10,000, both signs: nothing overflows, and weights that vanish are zero."""
    for length, scale, splits in itertools.product((3, 200), (150.0, -150.0), (1, 3)):
        q, k, v = made(2, heads, length, (65, 9), dtype, scale=8)
        splits = min(splits, -(-length // 64))
        found = attend(q, k, v, scale, None, splits)
        check(q, k, v, scale, None, found, (length, scale, splits))


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_differ_in_size_keep_the_digits_of_small_weights(dtype, heads):
    """Weights down to e⁻¹², and values that are larger the less they weigh: all count alike."""
    length = 200
    below = torch.linspace(0, 12, length)
    q, k, v = made(1, heads, length, (16, 16), dtype)
    mask = (-below).expand(1, 1, 1, length).to(dtype)
    v = (v.double() * below.exp()[:, None] / 100).to(dtype)
    check(q, k, v, 0.05, mask, attend(q, k, v, 0.05, mask, 2))


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_of_least_numbers(dtype, heads):
    """What models add in order to hide: also where it is added everywhere, and all is even."""
    q, k, v = made(2, heads, 150, (16, 16), dtype)
    mask = torch.zeros(2, 1, 1, 150, dtype=dtype)
    mask[0, ..., 7:] = mask[1] = torch.finfo(dtype).min
    expected = sdpa(q.double(), k.double(), v.double(), mask.double(), scale=1e-9, enable_gqa=True)
    for splits in (1, 2):
        found = attend(q, k, v, 1e-9, mask, splits).transpose(1, 2).double()
        assert float((found - expected).abs().max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_that_sees_nothing_is_what_torch_makes_of_it(dtype, heads):
    q, k, v = made(3, heads, 150, (24, 24), dtype)
    seen = mask_of("bool", 3, 150, dtype)
    seen[1] = False
    for mask, splits in itertools.product(
        (seen, torch.where(seen, 0.0, -INF).to(dtype)), (None, 1)
    ):
        theirs = sdpa(q, k, v, mask, enable_gqa=True).transpose(1, 2)
        found = attend(q, k, v, 24**-0.5, mask, splits)
        assert torch.equal(found[1], theirs[1])
        assert torch.equal(found[1], torch.zeros_like(found[1]))
        keep = torch.tensor([0, 2])
        check(q[keep], k[keep], v[keep], 24**-0.5, mask[keep], found[keep])


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_pass_through(dtype, heads):
    """Where torch has them, and in no other head or sequence."""
    for name, value, splits in itertools.product("qkv", (NAN, INF, -INF), (1, 2)):
        q, k, v = made(2, heads, 100, (24, 40), dtype)
        {"q": q, "k": k, "v": v}[name][1, 1, 0, 5] = value
        theirs = sdpa(q, k, v, scale=0.2, enable_gqa=True).transpose(1, 2).double()
        found = attend(q, k, v, 0.2, None, splits).double()
        what = (name, value, splits)
        assert torch.equal(found.isnan(), theirs.isnan()), what
        assert torch.equal(found.isinf(), theirs.isinf()), what
        finite = theirs.isfinite()
        assert torch.allclose(found[finite], theirs[finite], atol=0.02), what


def test_scores_that_are_all_minus_infinity():
    """No mask hides anything, and no weight is left: zero, as torch has it."""
    for heads in ((4, 2), (2, 2)):
        q, _, v = made(2, heads, 37, (24, 24), torch.float32)
        k = torch.full_like(v, -INF)
        theirs = sdpa(q.abs(), k, v, enable_gqa=True)
        assert torch.equal(theirs, torch.zeros_like(theirs))
        assert torch.equal(attend(q.abs(), k, v, 0.2), theirs.transpose(1, 2))


def sights(length):
    """Masks [2, 1, 1, T]: a cache that is longer than what is valid, a window, and holes."""
    t = torch.arange(length)
    seen = {
        "static": torch.stack([t < length // 5, t < length // 3]),
        "window": torch.stack([(t > length // 2) & (t < length // 2 + 40), t > length - 9]),
        "holes": torch.stack([t % 7 == 3, (t < 5) | (t > length - 30)]),
        "one": torch.stack([t == length - 1, t == 70]),
    }
    return {name: x.view(2, 1, 1, length) for name, x in seen.items()}


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_in_hidden_positions_does_not_matter(dtype, heads):
    for (name, seen), added in itertools.product(sights(400).items(), (False, True)):
        q, k, v = made(2, heads, 400, (24, 24), dtype)
        mask = torch.where(seen, 0.5, -INF).to(dtype) if added else seen
        hidden = ~seen.view(2, 1, 400, 1)
        given = [x.masked_fill(hidden, NAN) for x in (k, v)]
        for splits in (None, 1):
            found = attend(q, *given, 0.2, mask, splits)
            check(q, k, v, 0.2, mask, found, (name, added, splits))


@contextmanager
def addresses():
    """A set of all that is loaded by masked loads of the interpreter meanwhile."""
    from triton.runtime.interpreter import interpreter_builder as builder

    load, seen = builder.create_masked_load, set()

    def create_masked_load(ptrs, mask, *rest):
        seen.update(ptrs.data[mask.data].ravel().tolist())
        return load(ptrs, mask, *rest)

    builder.create_masked_load = create_masked_load
    try:
        yield seen
    finally:
        del builder.create_masked_load


@pytest.mark.skipif(not interpreted(), reason="the interpreter knows what is loaded")
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
def test_only_visible_positions_are_read(heads):
    for name, seen in sights(400).items():
        q, k, v = made(2, heads, 400, (24, 24), torch.float32)
        with addresses() as read:
            found = attention.attend(q, k, v, 0.2, seen)
        check(q, k, v, 0.2, seen, found, name)
        for x in (k, v):
            rows = torch.tensor(x.data_ptr() + 4 * torch.arange(x.numel())).view(x.shape)
            shown = seen.view(2, 1, 400, 1).expand_as(x)
            assert read.issuperset(rows[shown].tolist())
            assert read.isdisjoint(rows[~shown].tolist())


@pytest.mark.skipif(not interpreted(), reason="the interpreter runs programs in any order")
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (19, 1)], ids=str)
def test_no_bit_depends_on_the_order_of_programs(heads):
    """Every one of them is the last of its heads in some order."""
    splits = 4
    q, k, v = made(1, heads, 300, (24, 40), torch.bfloat16, scale=3)
    mask = mask_of("bool", 1, 300, torch.bfloat16)
    expected = attend(q, k, v, 0.3, mask, splits)
    check(q, k, v, 0.3, mask, expected)
    places = range(heads[1] * -(-heads[0] // heads[1] // 16) * splits)
    last = {chance.Random(seed).sample(places, len(places))[-1]: seed for seed in range(200)}
    assert len(last) == len(places)
    for seed in last.values():
        with permuted(seed):
            assert torch.equal(attend(q, k, v, 0.3, mask, splits), expected)


def test_counters_are_left_at_zero(monkeypatch):
    """So that a captured launch finds them so when it runs again."""
    taken, take = [], counters.take
    monkeypatch.setattr(counters, "take", lambda *args: taken.append(take(*args)) or taken[-1])
    q, k, v = made(2, (4, 2), 300, (24, 40), torch.float32)
    attend(q, k, v, 0.3, None, 3)
    assert [len(given) for given in taken] == [4]
    assert not taken[0].any()


def test_splits_depend_on_shapes_alone_and_fill_the_device():
    cut = attention.cut_for(4, 128, 128, torch.bfloat16)
    for shares, length, expected in ((8, 8192, 33), (8, 100, 2), (8, 1, 1), (512, 8192, 1)):
        assert attention.splits_for(shares, length, 512, cut, HOPPER) == expected
    few = Device("a small one", (8, 0), 4)
    assert attention.splits_for(1, 10**6, 512, cut, few) == 8
    # Of many heads the last program has more to add up.
    assert attention.splits_for(1, 10**6, 16 * 128, cut, HOPPER) == 32


def test_a_longer_cache_and_more_sequences_need_no_other_kernel():
    found = set()
    for batch, length in ((1, 16), (1, 17), (3, 31), (2, 64)):
        q, k, v = made(batch, (4, 2), length, (32, 32), torch.bfloat16)
        mask = torch.ones(batch, 1, 1, 2 * length, dtype=torch.bool)[..., :length]
        q, k, v, mask = on_device([q, k, v, mask])
        found.add(attention.kind(q, k, v, mask[:, :, :, :])[:-1])  # but for how far masks are apart
    assert len(found) == 1
    other = [
        attention.kind(q.float(), k.float(), v.float(), mask),
        attention.kind(q, k, v),
        attention.kind(q, k, v, mask.to(q.dtype)),
        attention.kind(q, k, v[..., :16], mask),
        attention.kind(q[:, :2], k, v, mask),
    ]
    assert len({attention.kind(q, k, v, mask), *other}) == 6


def test_what_the_kernel_does_not_take():
    q, k, v = on_device(list(made(2, (4, 2), 5, (8, 8), torch.float32)))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool, device=DEVICE)
    wide = torch.zeros(1, 1, 1, 513, device=DEVICE)
    far = torch.empty_strided((2, 1, 1, 5), (2**31, 1, 1, 1), dtype=q.dtype, device="meta")
    apart = torch.empty_strided((2, 2, 5, 8), (8, 8, 2**24 + 1, 1), device="meta")
    refused = [
        ("2 tokens", (q.repeat(1, 1, 2, 1), k, v)),
        ("dtypes: torch.float64", (q.double(), k.double(), v.double())),
        (f"on one device \\({q.device}\\)", (q, k.to("meta"), v)),
        ("do not fit", (q, k[:, :, :3], v)),
        ("no multiple of 2", (q[:, :3], k, v)),
        ("nothing to attend to", (q, k[:, :, :0], v[:, :, :0])),
        ("not dense", (q, k.mT.contiguous().mT, v)),
        (r"the mask is \[2, 4, 1, 5\]", (q, k, v, mask.expand(2, 4, 1, 5))),
        ("the mask is torch.float64", (q, k, v, mask.double())),
        ("the mask is torch.bool on meta", (q, k, v, mask.to("meta"))),
        ("heads have 513 features; the kernel takes 512", (wide, wide, wide)),
        ("is 16777217 numbers from the next", (q.to("meta"), apart, v.to("meta"))),
        ("is 16777217 numbers from the next", (q.to("meta"), k.to("meta"), apart)),
        ("the next sequence is 2147483648 numbers away", (*(x.to("meta") for x in (q, k, v)), far)),
    ]
    for message, given in refused:
        said = attention.unfit(*given) or ""
        assert re.search(message, said), (message, said)
    assert attention.unfit(q, k, v, mask) is None


@pytest.mark.parametrize("kind", MASKS)
def test_the_operator(kind):
    q, k, v = made(2, (4, 2), 70, (24, 40), torch.float32)
    mask = mask_of(kind, 2, 70, torch.float32)
    q, k, v, mask = on_device([q, k, v, mask])
    given = (q, k, v, [] if mask is None else [mask], 0.3)
    assert torch.equal(
        attention.attend_in_graph(q, k, v, 0.3, mask), attention.attend(*given[:3], 0.3, mask)
    )
    torch.library.opcheck(torch.ops.flashnorm.attend_gpu.default, given)


@pytest.mark.skipif(not interpreted(), reason="sdpa on a GPU has bounds of its own")
def test_the_operator_falls_back_where_no_kernel_runs(monkeypatch):
    from flashnorm.kernels.fallback import fallbacks
    from flashnorm.kernels.gpu import ways

    q, k, v = on_device(list(made(2, (4, 2), 70, (24, 24), torch.float32)))
    expected = attention.attend(q, k, v, 0.3)
    monkeypatch.setattr(ways, "unusable", lambda x: "the card is an old one")
    found = attention.attend_in_graph(q, k, v, 0.3, None)
    assert fallbacks()["the card is an old one"] == 1
    assert found.is_contiguous()
    assert not torch.equal(found, expected)  # another order of sums
    check(*(x.cpu() for x in (q, k, v)), 0.3, None, found.cpu())
