"""Attention of one new token per sequence: its positions are split over programs, in one launch.

A program has up to 16 heads that share keys and values, so that those are read once, and every
`splits`-th block of positions: what is visible at one end of a long cache is a part of everybody's.
The last program of some heads joins what all of them found, always in the same order.
"""

import triton
import triton.language as tl

from flashnorm.kernels.gpu.device.dependent import release, wait
from flashnorm.kernels.gpu.device.parts import is_last, narrow, product

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def visible(mask_at, mask_step, t, length, MASK: tl.constexpr):
    """Which of the positions t are seen, and what is added to their scores."""
    seen = t < length
    added = 0.0
    if MASK == "bool":
        hides = tl.load(mask_at + t.to(tl.int64) * mask_step, mask=seen, other=0)
        seen = seen & (hides != 0)
    if MASK == "added":
        added = tl.load(mask_at + t.to(tl.int64) * mask_step, mask=seen, other=0.0)
        added = added.to(tl.float32)
        seen = seen & (added != NOTHING)
    return seen, added


@triton.jit
def own_blocks(
    mask_at, mask_step, split, splits, length,
    MASK: tl.constexpr, POSITIONS: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """First and behind the last of a split's own blocks in which something is seen."""
    count = tl.cdiv(tl.cdiv(length, POSITIONS) - split, splits)
    first = 0
    end = count
    if MASK != "absent":
        first = count
        end = 0
        for begin in range(0, count, SCANNED):
            i = begin + tl.arange(0, SCANNED)
            t = (split + i * splits)[:, None] * POSITIONS + tl.arange(0, POSITIONS)[None, :]
            seen, _added = visible(mask_at, mask_step, t, length, MASK)
            some = tl.max(seen.to(tl.int32), axis=1) != 0
            first = tl.minimum(first, tl.min(tl.where(some, i, count)))
            end = tl.maximum(end, tl.max(tl.where(some, i + 1, 0)))
    return first, end


@triton.jit
def finite(largest):
    """What is subtracted from scores: the largest, or 0 where there is none but -inf."""
    return tl.where(largest == NOTHING, 0.0, largest)


@triton.jit
def part_of_one(
    q_at, k_at, k_row, v_at, v_row, mask_at, mask_step, scale, first, end, split, splits, length,
    MASK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and of weighted values of one head: [1], [1], [1, WIDE].

    By multiply-add in float32. Every position of a block has sums of its own until the end.
    """
    steps = tl.arange(0, POSITIONS)
    deep = tl.arange(0, DEPTH)
    wide = tl.arange(0, WIDE)
    query = tl.load(q_at + deep[None, :], mask=(deep < WIDTH)[None, :], other=0.0).to(tl.float32)
    largest = tl.full([POSITIONS], NOTHING, tl.float32)
    total = tl.zeros([POSITIONS], tl.float32)
    sums = tl.zeros([POSITIONS, WIDE], tl.float32)
    for i in tl.range(first, end, num_stages=STAGES):
        t = (split + i * splits) * POSITIONS + steps
        seen, added = visible(mask_at, mask_step, t, length, MASK)
        begin = ((split + i * splits) * POSITIONS).to(tl.int64)
        there = seen[:, None] & (deep < WIDTH)[None, :]
        at = steps[:, None] * k_row + deep[None, :]
        keys = tl.load(k_at + begin * k_row + at, mask=there, other=0.0)
        there = seen[:, None] & (wide < VALUE_WIDTH)[None, :]
        at = steps[:, None] * v_row + wide[None, :]
        values = tl.load(v_at + begin * v_row + at, mask=there, other=0.0)
        scores = tl.sum(keys.to(tl.float32) * query, axis=1) * scale + added
        scores = tl.where(seen, scores, NOTHING)
        before = largest
        largest = tl.maximum(largest, scores)
        moved = tl.exp(before - finite(largest))
        weights = tl.exp(scores - finite(largest))
        total = total * moved + weights
        sums = sums * moved[:, None] + weights[:, None] * values.to(tl.float32)
    top = tl.max(largest, axis=0)
    moved = tl.exp(largest - finite(top))
    total = tl.sum(total * moved, axis=0)
    sums = tl.sum(sums * moved[:, None], axis=0)
    one = tl.zeros([1], tl.float32)
    return one + top, one + total, sums[None, :]


@triton.jit
def keys_times(
    q_at, query, k_at, k_row, seen,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q kᵀ: [ROWS, POSITIONS]. A width above DEPTH is read in parts, q as well."""
    scores = tl.zeros([ROWS, POSITIONS], tl.float32)
    steps = tl.arange(0, POSITIONS)[:, None]
    for begin in tl.static_range(0, WIDTH, DEPTH):
        deep = begin + tl.arange(0, DEPTH)
        inside = (deep < WIDTH)[None, :]
        if DEPTH < WIDTH:
            query = tl.load(q_at[:, None] + deep[None, :], mask=inside, other=0.0)
        there = seen[:, None] & inside
        at = steps * k_row + deep[None, :]
        keys = tl.load(k_at + at, mask=there, other=0.0)
        scores = product(query, tl.trans(keys), scores, PRECISION)
    return scores


@triton.jit
def plus_weighted(weights, values, sums, PRECISION: tl.constexpr):
    """sums + weights · values. Half precision takes a weight as the sum of two numbers.

    As one it would lose as much as the rounding of the result. The first number is smaller than the
    weight, by a little more than it may be off, so that the second is above zero as well and an
    infinite value stays one. The second is off by 1.25 · 2⁻¹⁶ of the weight in bfloat16, by
    1.25 · 2⁻²⁰ in float16.
    """
    dtype = values.dtype
    if dtype == tl.float32:
        return product(weights, values, sums, PRECISION)
    LESS: tl.constexpr = 1 - 2.0**-7 if dtype == tl.bfloat16 else 1 - 2.0**-9
    first = narrow(weights * LESS, dtype)
    sums = product(first, values, sums, PRECISION)
    return product(narrow(weights - first.to(tl.float32), dtype), values, sums, PRECISION)


@triton.jit
def part_of_several(
    q_at, k_at, k_row, v_at, v_row, mask_at, mask_step, scale, first, end, split, splits, length,
    MASK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    POSITIONS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`part_of_one` for heads that share keys and values, by matrix units: [ROWS] and [.., WIDE].

    Weights are at most 2¹⁴, not 1, where float16 would lose the digits of small ones.
    """
    ONE: tl.constexpr = 16384.0 if v_at.dtype.element_ty == tl.float16 else 1.0
    steps = tl.arange(0, POSITIONS)
    deep = tl.arange(0, DEPTH)
    wide = tl.arange(0, WIDE)
    query = tl.load(q_at[:, None] + deep[None, :], mask=(deep < WIDTH)[None, :], other=0.0)
    largest = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    for i in tl.range(first, end, num_stages=STAGES):
        t = (split + i * splits) * POSITIONS + steps
        seen, added = visible(mask_at, mask_step, t, length, MASK)
        begin = ((split + i * splits) * POSITIONS).to(tl.int64)
        scores = keys_times(
            q_at, query, k_at + begin * k_row, k_row, seen, WIDTH, DEPTH, ROWS, POSITIONS, PRECISION
        )
        there = seen[:, None] & (wide < VALUE_WIDTH)[None, :]
        at = steps[:, None] * v_row + wide[None, :]
        values = tl.load(v_at + begin * v_row + at, mask=there, other=0.0)
        scores = scores * scale
        if MASK == "added":
            scores += added[None, :]
        scores = tl.where(seen[None, :], scores, NOTHING)
        before = largest
        largest = tl.maximum(largest, tl.max(scores, axis=1))
        moved = tl.exp(before - finite(largest))
        weights = tl.exp(scores - finite(largest)[:, None]) * ONE
        total = total * moved + tl.sum(weights, axis=1)
        sums = plus_weighted(weights, values, sums * moved[:, None], PRECISION)
    return largest, total, sums


@triton.jit
def joined(
    sums_at, largest_at, total_at, splits,
    KEPT: tl.constexpr, WIDE: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Sum of weights [KEPT] and of weighted values [KEPT, WIDE] of all splits, JOINED at a time."""
    row = tl.arange(0, KEPT)[None, :]
    wide = tl.arange(0, WIDE)[None, None, :]
    top = tl.full([KEPT], NOTHING, tl.float32)
    for begin in range(0, splits, 64):
        s = begin + tl.arange(0, 64)[:, None]
        there = s < splits
        found = tl.load(
            largest_at + s * KEPT + row, mask=there, other=NOTHING, cache_modifier=".cg"
        )
        top = tl.maximum(top, tl.max(found, axis=0))
    total = tl.zeros([JOINED, KEPT], tl.float32)
    sums = tl.zeros([JOINED, KEPT, WIDE], tl.float32)
    for begin in range(0, splits, JOINED):
        s = begin + tl.arange(0, JOINED)[:, None]
        there = s < splits
        at = s * KEPT + row
        found = tl.load(largest_at + at, mask=there, other=NOTHING, cache_modifier=".cg")
        moved = tl.exp(found - finite(top)[None, :])
        total += moved * tl.load(total_at + at, mask=there, other=0.0, cache_modifier=".cg")
        at = at[:, :, None] * WIDE + wide
        part = tl.load(sums_at + at, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        sums += moved[:, :, None] * part
    return tl.sum(total, axis=0), tl.sum(sums, axis=0)


@triton.jit
def written(
    total, sums, out_at, head,
    HEADS: tl.constexpr, VALUE_WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store sums / total of some heads; zero where no position has a weight."""
    y = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    wide = tl.arange(0, WIDE)[None, :]
    inside = (head < HEADS)[:, None] & (wide < VALUE_WIDTH)
    tl.store(
        out_at + head[:, None] * VALUE_WIDTH + wide, narrow(y, out_at.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["mask_batch", "groups", "length", "splits"])
def attend(
    q, q_batch, q_head,
    k, k_batch, k_head, k_row,
    v, v_batch, v_head, v_row,
    mask, mask_batch, mask_step,
    out, parts, counters,
    scale, groups, length, splits,
    MASK: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    POSITIONS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    SCANNED: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[b, h] = Σ_t softmax_t(scale · q[b, h]·k[b, g, t] + mask[b, t]) v[b, g, t]

    g = h // HEADS. grid: [B · groups · ⌈HEADS / ROWS⌉ · splits].
    parts: [shares, splits, KEPT, WIDE] sums, then [shares, splits, KEPT] largest scores and sums of
    weights; counters: [shares], zero. With one split neither is touched. A block of positions that
    the mask hides altogether is not read, nor a row of k and v of a hidden position.
    """
    wait(PDL)
    release(PDL)
    CHUNKS: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    split = tl.program_id(0) % splits
    share = tl.program_id(0) // splits
    pair = share // CHUNKS
    b = (pair // groups).to(tl.int64)
    g = (pair % groups).to(tl.int64)
    first_head = (share % CHUNKS) * ROWS
    mask_at = mask
    if MASK != "absent":
        mask_at = mask + b * mask_batch
    first, end = own_blocks(mask_at, mask_step, split, splits, length, MASK, POSITIONS, SCANNED)

    k_at = k + b * k_batch + g * k_head
    v_at = v + b * v_batch + g * v_head
    head = first_head + tl.arange(0, ROWS)
    if ROWS == 1:
        q_at = q + b * q_batch + g * q_head
        largest, total, sums = part_of_one(
            q_at, k_at, k_row, v_at, v_row, mask_at, mask_step, scale, first, end, split, splits,
            length, MASK, WIDTH, VALUE_WIDTH, POSITIONS, DEPTH, WIDE, STAGES,
        )  # fmt: skip
    else:
        q_at = q + b * q_batch + (g * HEADS + tl.minimum(head, HEADS - 1)) * q_head
        largest, total, sums = part_of_several(
            q_at, k_at, k_row, v_at, v_row, mask_at, mask_step, scale, first, end, split, splits,
            length, MASK, WIDTH, VALUE_WIDTH, ROWS, POSITIONS, DEPTH, WIDE, PRECISION, STAGES,
        )  # fmt: skip

    out_at = out + pair.to(tl.int64) * HEADS * VALUE_WIDTH
    if splits == 1:
        written(total, sums, out_at, head, HEADS, VALUE_WIDTH, WIDE)
    else:
        programs = tl.num_programs(0).to(tl.int64)
        largest_at = parts + programs * KEPT * WIDE
        total_at = largest_at + programs * KEPT
        row = tl.arange(0, ROWS)
        at = tl.program_id(0).to(tl.int64) * KEPT + row
        tl.store(largest_at + at, largest, mask=row < KEPT)
        tl.store(total_at + at, total, mask=row < KEPT)
        at = at[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
        tl.store(parts + at, sums, mask=(row < KEPT)[:, None])
        if is_last(counters + share, splits):
            begin = share.to(tl.int64) * splits * KEPT
            all_total, all_sums = joined(
                parts + begin * WIDE,
                largest_at + begin,
                total_at + begin,
                splits,
                KEPT,
                WIDE,
                JOINED,
            )
            kept_head = first_head + tl.arange(0, KEPT)
            written(all_total, all_sums, out_at, kept_head, HEADS, VALUE_WIDTH, WIDE)
