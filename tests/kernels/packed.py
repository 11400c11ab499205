"""Random packed weights of every format, and how large the parts of their numbers are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashnorm.kernels.formats import blocks, codebook, columns, groups, rows
from flashnorm.kernels.weights import Weight

Make = Callable[[int, int, int], Weight]
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def _random(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _bytes(k: int, width: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (k, width), generator=_random(seed), dtype=torch.uint8)


def _grid(k: int, count: int, seed: int, size: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """[k, count], half of them laid out as [count, k]."""
    made = (torch.rand(k, count, generator=_random(seed)) + 0.5) * size
    made = made * (torch.randint(0, 2, (k, count), generator=_random(seed + 1)) * 2 - 1)
    made = made.to(dtype)
    return made.T.contiguous().T if seed % 2 else made


def _levels(k: int, n: int, seed: int) -> Tensor:
    return _bytes(k, n, seed).view(torch.int8)


def int8_rows(k: int, n: int, seed: int) -> Weight:
    scales = _grid(k, 1, seed, n**-0.5 / 64)
    return Weight(_levels(k, n + 3, seed), rows.INT8_ROWS, scales, k, n)


def fp8_rows(k: int, n: int, seed: int) -> Weight:
    values = torch.randn(k, n + 5, generator=_random(seed)).mul(20).to(torch.float8_e4m3fn)
    dtype = SCALES[seed % 3]
    return Weight(values, rows.FP8_ROWS, _grid(k, 1, seed, n**-0.5 / 20, dtype), k, n)


def fp8_groups(k: int, n: int, seed: int, group: int = 32) -> Weight:
    return fp8_rows(k, n, seed)._replace(
        scales=_grid(k, -(-n // group), seed, n**-0.5 / 20), group=group
    )


def int8_groups(k: int, n: int, seed: int, group: int = 32) -> Weight:
    count, dtype = -(-n // group), SCALES[seed % 3]
    zeros = torch.randint(-9, 9, (k, count), generator=_random(seed + 3), dtype=torch.int8)
    scales = _grid(k, count, seed, n**-0.5 / 64, dtype)
    return Weight(_levels(k, n, seed), groups.INT8_GROUPS, scales, k, n, group, zeros)


def int4_groups(k: int, n: int, seed: int, group: int = 32) -> Weight:
    count, dtype = -(-n // group), SCALES[seed % 3]
    values = _bytes(k, -(-n // 2), seed)
    return Weight(
        values, groups.INT4_GROUPS, _grid(k, count, seed, n**-0.5 / 4, dtype), k, n, group
    )


def int4_zeros(k: int, n: int, seed: int, group: int = 64) -> Weight:
    made = int4_groups(k, n, seed, group)
    zeros = torch.randint(0, 16, (k, -(-n // group)), generator=_random(seed + 3))
    return made._replace(zeros=zeros.to((torch.uint8, torch.int8, torch.float32)[seed % 3]))


def int4_offsets(k: int, n: int, seed: int, group: int = 128) -> Weight:
    made = int4_groups(k, n, seed, group)
    offsets = _grid(k, -(-n // group), seed + 5, n**-0.5, SCALES[(seed + 1) % 3])
    return made._replace(offsets=offsets)


def int4_rows(k: int, n: int, seed: int) -> Weight:
    return int4_groups(k, n, seed, n + n % 2)._replace(group=0)


def codebook4(k: int, n: int, seed: int, group: int = 64) -> Weight:
    table = torch.randn(16, generator=_random(seed))
    scales = _grid(k, -(-n // group), seed, n**-0.5)
    values = _bytes(k, -(-n // 2), seed)
    return Weight(values, codebook.CODEBOOK4, scales, k, n, group, table=table)


def _words(first: int, second: int, seed: int) -> Tensor:
    return _bytes(first, 4 * second, seed).view(torch.int32)


def gptq4(k: int, n: int, seed: int, group: int = 32) -> Weight:
    like = int4_zeros(k, n, seed, group)
    return like._replace(values=_words(-(-n // 8), k, seed), format=columns.GPTQ4)


def awq4(k: int, n: int, seed: int, group: int = 32) -> Weight:
    like = int4_zeros(k, n, seed, group)
    return like._replace(values=_words(n, -(-k // 8), seed), format=columns.AWQ4)


def block(name: str, k: int, n: int, seed: int) -> Weight:
    """Random bytes, but for the float16 numbers, which are of a likely size."""
    kind = blocks.BLOCKS[name]
    count = n // kind.elements
    values = _bytes(k, count * kind.bytes, seed).unflatten(1, (count, kind.bytes)).clone()
    size = n**-0.5 / {"q8_0": 64, "q4_k": 200, "q5_k": 500, "q6_k": 900}.get(name, 6)
    for i, at in enumerate(halves(name)):
        half = _grid(k, count, seed + i, size * (1, 3)[i], torch.float16)
        values[..., at : at + 2] = half.contiguous().view(torch.uint8).unflatten(1, (count, 2))
    return Weight(values.flatten(1), kind.format, None, k, n)


def halves(name: str) -> tuple[int, ...]:
    """Where a block has its float16 numbers: the scale, and what is subtracted or added."""
    if name == "q6_k":
        return (208,)
    return (0,) if name in ("q8_0", "q4_0", "q5_0") else (0, 2)


# By name: what makes it, and of how many features it takes multiples.
EVERY: dict[str, tuple[Make, int]] = {
    "int8-rows": (int8_rows, 1),
    "int8-groups": (int8_groups, 1),
    "fp8-rows": (fp8_rows, 1),
    "fp8-groups": (fp8_groups, 1),
    "int4-groups": (int4_groups, 1),
    "int4-zeros": (int4_zeros, 1),
    "int4-offsets": (int4_offsets, 1),
    "int4-rows": (int4_rows, 1),
    "codebook4": (codebook4, 1),
    "gptq4": (gptq4, 1),
    "awq4": (awq4, 1),
}


def _block_maker(name: str) -> Make:
    return lambda k, n, seed: block(name, k, n, seed)


EVERY |= {name: (_block_maker(name), kind.elements) for name, kind in blocks.BLOCKS.items()}


def bits_of_levels(weight: Weight) -> int:
    """How many bits a level has; 0 where they are no whole numbers, or lie as AWQ has them."""
    name = weight.format.name
    if name in blocks.BLOCKS:
        return int(name[1])
    return {"int4-groups": 4, "gptq4": 4, "int8-groups": 8, "int8-rows": 8}.get(name, 0)


def sizes(weight: Weight) -> Tensor:
    """|q · scale| + |zero · scale| + |offset| at least, [k, n] float64: what rounding goes by."""
    whole = weight.dequantized().abs()
    if weight.format.name in blocks.BLOCKS:
        return whole + 2 * added(weight).abs()
    scales, zeros = groups.spread(weight, weight.scales), groups.spread(weight, weight.zeros)
    offsets = groups.spread(weight, weight.offsets)
    if zeros is not None and scales is not None:
        whole = whole + 2 * (zeros * scales).abs()
    return whole if offsets is None else whole + 2 * offsets.abs()


def added(weight: Weight) -> Tensor:
    """What blocks add to q · scale: what is left of them without their scale."""
    kind = blocks.find(weight)
    values = weight.values.unflatten(1, (-1, kind.bytes)).clone()
    at = halves(weight.format.name)[0]
    values[..., at : at + 2] = 0
    return weight._replace(values=values.flatten(1)).dequantized()
