"""Norm + linear on every way: norms, dtypes, shapes, arguments, strides."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.errors import FlashNormError
from flashnorm.kernels import gpu, norms
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import gemm, launch, skinny
from flashnorm.kernels.gpu.step import execute
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, make, random
from tests.kernels.gpu.calls import WAYS, check, permuted, rounds_first, there

# rows, n, widths: a tail of n, n = 1, several steps of n and k = 1, two launches of four weights.
SHAPES = [
    ((1, 67), (9,)),
    ((1, 1), (3,)),
    ((3, 300), (1,)),
    ((4, 45), (9, 33, 3, 6)),
]
ALL = {"gain": True, "norm_bias": True, "bias": True}


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype, norm):
    for (shape, widths), options in itertools.product(SHAPES, ({}, ALL)):
        check(make(shape, widths, dtype, norm, **options), what=(shape, options))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_argument_alone(dtype, norm):
    for option in ({"gain": True}, {"norm_bias": True}, {"bias": True}, {"residual": True}):
        check(make((1, 67), (9,), dtype, norm, **option), "skinny", what=option)
        check(make((3, 67), (9,), dtype, norm, **option), what=option)
    plain = make((3, 67), (9,), dtype, norm, gain=True, gain_offset=0.0)
    check(plain, what="no offset")


@pytest.mark.parametrize("rows", [17, 33, 64, 65])
def test_rows_that_need_higher_tiles(rows):
    for dtype in DTYPES:
        check(make((rows, 20), (35,), dtype, "none", bias=True), what=dtype)
    check(make((rows, 20), (7,), torch.bfloat16, "layer", gain=True), what="layer")


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_a_gemm(dtype, norm):
    """More rows of tiles than share the cache, ends in every direction, and a gate."""
    for rows, activation in ((150 if norm == "none" else 20, None), (20, "silu")):
        widths = (37, 37) if activation else (37,)
        call = make((rows, 40), widths, dtype, norm, bias=True, activation=activation)
        moved = there(call)
        y = moved.x.new_empty(rows, 37)
        execute(gemm.steps(moved, [y], launch.HOPPER, launch.Tile(16, 16, 16, 1, 2)))
        assert_close(call, [y.cpu()], what=activation, first=False)


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates(dtype, activation):
    check(make((1, 67), (9, 9), dtype, "rms", activation=activation), "skinny")
    for norm, options in (("rms", {}), ("layer", {**ALL, "residual": True})):
        check(make((3, 67), (9, 9), dtype, norm, activation=activation, **options), what=norm)


def test_a_gate_with_one_bias():
    for rows, first in itertools.product((1, 4), (0, 1)):
        call = make((rows, 40), (9, 9), torch.bfloat16, bias=True, activation="silu")
        call.biases[first] = None
        check(call, what=(rows, first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_that_takes_several_steps(dtype):
    for norm, n in itertools.product(("rms", "layer"), (1024, 1090)):
        check(make((1, n), (5,), dtype, norm, gain=True), "skinny", what=(norm, n))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_n(dtype, norm):
    """Added up by the last program: a part may be empty, and statistics come before or after."""
    for rows, splits in ((1, 3), (3, 6)):
        for options in ({}, {**ALL, "residual": True}, {"activation": "silu", "bias": True}):
            widths = (19, 19) if "activation" in options else (19,)
            call = make((rows, 67), widths, dtype, norm, **options)
            tile = launch.Tile(1 if rows == 1 else 16, 16, 16, 1, 2, splits)
            split_check(call, tile, (rows, splits, options))


def split_check(call: Call, tile: launch.Tile, what: object) -> None:
    moved = there(call)
    first = by_tile(moved, tile)
    assert_close(call, [y.cpu() for y in first], what=what, first=rounds_first(call, "skinny"))
    for seed in range(3) if launch.interpreted() else ():  # whoever is last, and whoever is not
        with permuted(seed):
            again = by_tile(moved, tile)
        assert all(map(torch.equal, first, again)), (what, seed)


def by_tile(call: Call, tile: launch.Tile) -> list[torch.Tensor]:
    """The results of one launch, whose counters are as they were at the end."""
    outputs = [call.x.new_empty(call.x.shape[0], w.shape[0]) for w in call.results()]
    (step,) = skinny.steps(call, outputs, launch.HOPPER, tile)
    assert step.grid[1] == tile.splits
    execute([step])
    assert not step.arguments["counters"].any()
    return outputs


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_parts_of_n_for_weights_that_share_x(norm):
    call = make((3, 67), (9, 33, 17), torch.bfloat16, norm, gain=True, bias=True)
    split_check(call, launch.Tile(16, 16, 16, 1, 2, 3), norm)


def test_every_order_is_another_one():
    """That the checks above see different programs end last."""
    last = set()
    for seed in range(3):
        with permuted(seed):
            from triton.runtime.interpreter import interpreter_builder as builder

            builder.set_grid_dim(2, 3, 1)
            for place in itertools.product(range(2), range(3), range(1)):
                builder.set_grid_idx(*place)
            last.add(tuple(builder.grid_idx))
    assert len(last) > 1


@pytest.mark.parametrize(
    ("rows", "n", "widths", "gated", "programs", "parts"),
    [
        (16, 2048, [2048], False, 32, 4),  # 128 programs for 132 multiprocessors
        (16, 2048, [2048, 512, 512], False, 48, 2),
        (16, 2048, [8192], True, 128, 1),
        (16, 4096, [14336], True, 224, 4),  # 7 rounds of a quarter, in place of two whole ones
        (3, 4100, [5], False, 1, 7),
        (64, 512, [64], False, 1, 1),
    ],
)
def test_few_rows_are_cut_so_that_all_multiprocessors_have_as_much(
    rows, n, widths, gated, programs, parts
):
    tile = launch.skinny_tile(rows, n, widths, torch.bfloat16, gated, launch.HOPPER)
    assert (tile.columns, tile.warps) == (64, 4)
    assert sum(-(-width // tile.columns) for width in widths) == programs
    assert tile.splits == parts


def test_long_rows_are_split_by_themselves():
    check(make((3, 4100), (5,), torch.bfloat16), "skinny")
    check(make((2, 1100), (70, 5, 3), torch.bfloat16, "layer", bias=True), "skinny")


def test_the_same_call_gives_the_same_bits():
    call = there(make((3, 300), (5,), torch.float32, gain=True))
    for way in WAYS:
        assert torch.equal(gpu.run(call, way)[0], gpu.run(call, way)[0])


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_strides(norm):
    """Rows or columns that lie apart, several axes, halves of one weight, one row repeated."""
    dtype, kind = torch.bfloat16, norms.find(norm)
    wide = random(2, 3, 80, dtype=dtype, scale=2)
    weight = random(26, 90, dtype=dtype, scale=0.1, seed=1)
    residual = random(2, 3, 26, dtype=dtype, seed=2)[..., ::2]
    halves = [half[:, :40] for half in weight.chunk(2)]
    for x in (wide[..., :40], wide[..., ::2], wide.transpose(0, 1)[..., :40].transpose(0, 1)):
        check(Call(x, halves, None, kind, 1e-5, activation="relu", output_residual=residual))
        check(Call(x, halves, None, kind, 1e-5, random(40, dtype=dtype, seed=3)))
    repeated = wide[0, :1, :40].expand(4, 40)
    rows = residual[0, :1].expand(4, 13)
    check(Call(repeated, halves[:1], None, kind, 1e-5, output_residual=rows))


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_before_the_norm_is_added_first(dtype, norm):
    """Rounded, as in a model; where only s is needed, in the pass that takes the statistics."""
    for options in ({}, ALL, {"activation": "silu"}):
        widths = (9, 9) if "activation" in options else (9,)
        call = make((3, 67), widths, dtype, norm, **options)
        before = random(67, 3, dtype=dtype, scale=2, seed=7).t()
        summed = call._replace(x=call.x + before)
        for way in WAYS:
            found = gpu.run(there(call._replace(input_residual=before)), way)
            expected = gpu.run(there(summed), way)
            assert all(map(torch.equal, found, expected)), (way, options)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_do(way):
    for shape in ((0, 16), (2, 0, 16)):
        for activation in (None, "silu"):
            call = make(shape, (5, 5), torch.bfloat16, bias=True, activation=activation)
            assert [y.shape for y in gpu.run(there(call), way)] == (
                [(*shape[:-1], 5)] * (1 if activation else 2)
            )
    empty = make((2, 16), (0, 7, 0), torch.bfloat16, bias=True)
    found = gpu.run(there(empty), way)
    assert [y.shape[1] for y in found] == [0, 7, 0]
    check(empty, way)


def test_weights_of_an_odd_kind_do_not_go_together():
    """A bias for some of them only, and a width that is compiled into the kernel."""
    call = make((2, 33), (4, 5, 6), torch.float32, bias=True)
    call.biases[1] = None
    assert [len(group) for group in skinny.groups(call)] == [1, 1, 1]
    check(call, "skinny")
    assert [len(group) for group in skinny.groups(make((2, 33), (4,) * 4, torch.float32))] == [3, 1]


def test_what_a_way_cannot_do_is_refused():
    call = there(make((65, 16), (5,), torch.float32))
    with pytest.raises(FlashNormError, match="x has 65 rows; the skinny kernel takes 64 at most"):
        gpu.run(call, "skinny")
    with pytest.raises(FlashNormError, match="no way 'fast'; the ways are skinny, gemm and matmul"):
        gpu.run(call, "fast")


def test_tensorfloat_only_where_torch_may_use_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
            matmul.fp32_precision = allowed
            assert skinny.precision() == expected
        matmul.allow_tf32 = True
        assert skinny.precision() == "tf32"
    finally:
        matmul.fp32_precision = before
