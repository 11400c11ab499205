"""Packed weights: every format, norm, dtype, group, zero and offset, and numbers that are none."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashnorm.errors import FlashNormError
from flashnorm.kernels import gpu, ops, weights
from flashnorm.kernels.call import Call
from flashnorm.kernels.fallback import forbid_fallback
from flashnorm.kernels.gpu import calls, decoding, launch, packed
from flashnorm.kernels.gpu.backend import GPU
from flashnorm.kernels.gpu.cached import key_of
from flashnorm.kernels.gpu.step import execute
from flashnorm.kernels.weights import FP8, Weight
from tests.kernels.bounds import assert_close
from tests.kernels.cases import DTYPES, EVERY_ACTIVATION, EVERY_NORM, make, random
from tests.kernels.gpu.calls import check, permuted, rounds_first, there
from tests.kernels.gpu.weights import BF16, EVERY, F32, Packing, make_packed, make_weight

ALL = {"gain": True, "norm_bias": True, "bias": True}
# Widths end within a block or are one column; features end within a step, a group and a byte.
OPTIONS = [
    ((67, (70, 1)), {"gain": True}),
    ((96, (9, 9)), {**ALL, "activation": "silu", "residual": True}),
    ((96, (5, 3)), ALL),
    ((67, (9,)), {"residual": True}),
]


def cases():
    for (i, packing), (j, rows) in itertools.product(enumerate(EVERY), enumerate((1, 3))):
        norm, (size, options) = EVERY_NORM[(2 * i + j) % 4], OPTIONS[(i // 2 + j) % 4]
        yield packing, rows, norm, size, options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("packing", "rows", "norm", "size", "options"), list(cases()), ids=str)
def test_every_packing(packing, rows, norm, size, options, dtype):
    n, widths = size
    check(make_packed(packing, (rows, n), widths, dtype, norm, **options))


def test_the_cases_above_have_every_format_with_every_norm():
    found = {(case[0].format, case[2]) for case in cases()}
    assert found == set(itertools.product(decoding.KINDS, EVERY_NORM))
    for position in (2, 3, 4):
        assert len({packing[position] for packing in EVERY}) >= 3


@pytest.mark.parametrize("packing", EVERY[::4], ids=str)
@pytest.mark.parametrize("rows", [17, 64])
def test_rows_that_need_higher_tiles(rows, packing):
    check(make_packed(packing, (rows, 64), (35,), BF16, "layer", gain=True))


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_gates(activation):
    for rows, packing in ((1, EVERY[0]), (3, EVERY[10])):
        check(make_packed(packing, (rows, 64), (9, 9), BF16, "rms", activation=activation))


@pytest.mark.parametrize("packing", [EVERY[1], EVERY[9], EVERY[10]], ids=str)
def test_parts_of_n(packing):
    """Added up by the last program; a part may be empty; the scales of a row come to each part."""
    group = decoding.group_of(make_weight(packing, 1, 96))
    for rows, splits in ((1, 2), (3, 3)):
        for options in ({"gain": True}, {"activation": "silu", "bias": True, "residual": True}):
            widths = (19, 19) if "activation" in options else (19,)
            call = make_packed(packing, (rows, 96), widths, F32, "rms", **options)
            tile = launch.Tile(1 if rows == 1 else 16, 16, min(group or 64, 64), 1, 2, splits)
            moved, results = there(call), []
            for seed in range(2):
                outputs = [moved.x.new_empty(rows, 19)]
                (step,) = packed.steps(moved, outputs, launch.HOPPER, tile)
                with permuted(seed) if launch.interpreted() else torch.no_grad():
                    execute([step])
                assert step.grid[1] == splits
                assert not step.arguments["counters"].any()
                results.append(outputs[0])
            assert torch.equal(*results)
            assert_close(call, [results[0].cpu()], first=rounds_first(call, "skinny"))


def test_every_code_of_fp8():
    """Each of 256 as a weight of one feature, NaN among them, by bits and by whatever converts."""
    values = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 32)
    values[:, 1:] = 0
    scales = torch.ones(256, 1)
    weight = Weight(values.view(FP8), weights.find("fp8-rows"), scales, 256, 32)
    for dtype, rows in ((F32, 1), (F32, 2), (BF16, 1), (torch.float16, 2)):
        call = make((rows, 32), (256,), dtype, "none")._replace(weights=[weight])
        call.x[:] = 1.0
        (y,) = gpu.run(there(call))
        expected = values.view(FP8)[:, 0].to(dtype).expand(rows, -1)
        assert torch.equal(y.cpu().nan_to_num(nan=1e4), expected.nan_to_num(nan=1e4))
        assert expected.isnan().sum() == 2 * rows


def test_every_nibble_and_byte():
    """Each level at an even and at an odd feature, exactly."""
    for name, each in (("int8-rows", 1), ("int4-groups", 2)):
        values = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 32 // each)
        values[:, 1:] = 0x88 if each == 2 else 0
        values = values if each == 2 else values.view(torch.int8)
        weight = Weight(values, weights.find(name), torch.ones(256, 1), 256, 32)
        for dtype, rows in ((F32, 1), (F32, 2), (BF16, 1), (torch.float16, 2)):
            call = make((rows, 32), (256,), dtype, "none")._replace(weights=[weight])
            call.x[:] = torch.arange(1, 33)
            (y,) = gpu.run(there(call))
            assert torch.equal(y.cpu().double(), call.x.double() @ weight.dequantized().T)


HOSTILE = [0.0, float("inf"), float("-inf"), float("nan"), 2.0**-133, 1e30]


@pytest.mark.parametrize(
    "packing",
    [
        Packing("int8-rows"),
        Packing("int8-groups", 32, BF16, torch.int8),
        Packing("int4-groups", 32, BF16, None, BF16),
        Packing("int4-groups", 32, F32, F32),
        Packing("fp8-rows", 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_that_are_no_ordinary_numbers(packing, dtype):
    """They spoil their column and no other; a scale below the normal numbers is one like others."""
    for rows, part in ((1, "scales"), (3, "scales"), (3, "zeros"), (3, "offsets")):
        call = make_packed(packing, (rows, 96), (9,), dtype, "rms", gain=True)
        numbers = getattr(call.weights[0], part)
        if numbers is None or not numbers.is_floating_point():
            continue
        for i, value in enumerate(HOSTILE):
            numbers[1 + i, -1] = value
        check(call, what=(rows, part), alike=False)


def test_no_number_is_rounded_before_its_scale():
    """q · scale, or q less a zero that is not whole, would be off by all of these sums."""
    near = 1.0 + 2.0**-12
    values = torch.full((4, 64), 100, dtype=torch.int8)
    for scales, zeros, expected in (
        ((near, -1.0), None, 3200 * (near - 1)),
        ((1.0, -1.0), (near, 1.0), 32 * (1 - near)),
    ):
        scale = torch.tensor([scales]).repeat(4, 1)
        zero = None if zeros is None else torch.tensor([zeros]).repeat(4, 1)
        weight = Weight(values, weights.find("int8-groups"), scale, 4, 64, 32, zero)
        for dtype, rows in ((F32, 1), (F32, 2), (BF16, 1), (torch.float16, 2)):
            call = make((rows, 64), (4,), dtype, "none")._replace(weights=[weight])
            call.x[:] = 1.0
            (y,) = gpu.run(there(call))
            assert torch.equal(y.cpu().double(), torch.full((rows, 4), expected).double()), dtype


def test_values_and_scales_that_lie_in_larger_tensors():
    """Rows that lie apart, more rows than outputs, a scale for every column of a larger matrix."""
    for packing in (EVERY[2], EVERY[6], EVERY[13]):
        whole = make_weight(packing, 12, 128)
        width = whole.values.shape[1] // 2
        values, scales = whole.values[1:, width:], whole.scales[1:, 2:]
        weight = whole._replace(values=values, scales=scales, outputs=9, features=64)
        assert values.stride(0) == 2 * width
        call = make((3, 64), (9,), BF16, gain=True)._replace(weights=[weight])
        check(call, what=packing)
        x = random(3, 2, 64, dtype=BF16).transpose(0, 1)
        check(call._replace(x=x), what="strides of x")


def test_weights_of_one_launch_are_alike():
    dtype = torch.bfloat16
    call = make_packed(EVERY[3], (3, 64), (9, 5, 6, 7), dtype, bias=True)
    assert list(packed.groups(call)) == [[0, 1, 2], [3]]
    other = make_weight(EVERY[2], 5, 64)
    mixed = call._replace(weights=[call.weights[0], other, *call.weights[2:]])
    assert list(packed.groups(mixed)) == [[0], [1], [2, 3]]
    check(mixed)
    mixed.biases[2] = None
    assert list(packed.groups(mixed)) == [[0], [1], [2], [3]]
    check(mixed)


def test_nothing_to_do():
    call = make_packed(EVERY[3], (0, 64), (9, 5), BF16)
    assert [y.shape for y in gpu.run(there(call))] == [(0, 9), (0, 5)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 65}, "x has 65 rows; with packed weights the kernels take 64 at most"),
        ({"group": 48}, "a scale is for 48 features; the kernels take multiples of 32"),
        ({"group": 16}, "a scale is for 16 features"),
        ({"format": "codebook4"}, "do not know weights in the format 'codebook4'"),
        ({"dense": True}, "some weights are packed and others dense"),
        ({"gate": True}, "gate and up are packed in different ways"),
        ({"scales": torch.float64}, "scales or offsets are torch.float64"),
    ],
)
def test_what_is_refused_and_why(change, reason):
    group, rows = change.get("group", 32), change.get("rows", 2)
    call = make_packed(Packing("int8-groups", group), (rows, 96), (4, 4), BF16)
    first, second = call.weights
    if "format" in change:
        first = first._replace(format=weights.find("codebook4"), table=torch.zeros(16))
    if "dense" in change:
        second = make((2, 96), (4,), BF16).weights[0]
    if "scales" in change:
        first = first._replace(scales=first.scales.double())
    if "gate" in change:
        second = make_weight(Packing("int8-groups", 64), 4, 96)
        call = call._replace(activation="silu")
    call = call._replace(weights=[first, second])
    assert reason in gpu.why_not(there(call))


def test_other_ways_are_for_dense_weights():
    call = there(make_packed(EVERY[0], (2, 64), (4,), BF16))
    with pytest.raises(FlashNormError, match="the way 'gemm' takes dense weights only"):
        gpu.run(call, "gemm")
    assert gpu.choose(call).way == "skinny"
    assert "packed weights have no other kernel" in calls.explain(call)
    assert "programs of 64 columns" in calls.explain(call)


def test_a_bound_call_computes_its_readers_too():
    """What captured steps call; with more rows than the kernel takes it is the reference."""
    call = there(make_packed(EVERY[6], (2, 64), (5, 3), BF16, "rms", gain=True))
    bound = GPU.bind(call)
    assert bound.most == 64 * 64
    assert bound.precomputes(call.x)
    z, found = bound.normalize_and_run(call.x, None)
    assert torch.equal(z, bound.normalize(call.x))
    assert all(map(torch.equal, found, gpu.run(call)))
    many = call.x.repeat(33, 1)
    assert not bound.precomputes(many)
    with forbid_fallback(), pytest.raises(FlashNormError, match="x has 66 rows; with packed"):
        bound.run(many)
    assert [y.shape for y in bound.run(many)] == [(66, 5), (66, 3)]


def test_graphs_have_no_operator_for_them_and_say_so():
    call = make_packed(EVERY[0], (2, 64), (5,), BF16)
    assert GPU.in_graph(call) is None
    with pytest.raises(FlashNormError, match="packed weights have no place in the operator"):
        ops.run(call)


def test_an_x_of_a_model_that_runs_in_half_precision_takes_any_scales():
    """A call whose scales, zeros and biases are of other dtypes than x."""
    call = make_packed(Packing("int4-groups", 32, F32, BF16), (2, 64), (5,), torch.float16)
    call = call._replace(biases=[random(5, dtype=F32)], gain=random(64, dtype=BF16))
    assert isinstance(call, Call)
    check(call)


def test_sizes_that_are_compiled_into_a_kernel():
    for n, k, packing in ((1, 1, EVERY[0]), (1, 3, EVERY[11]), (33, 1, EVERY[6])):
        for rows in (1, 2):
            check(make_packed(packing, (rows, n), (k, k), BF16, "layer", bias=True), what=(n, k))


def test_what_was_measured_holds_for_a_format_and_its_groups():
    held = [Packing("int8-rows"), Packing("int8-groups", 32), Packing("int8-groups", 64)]
    keys = {key_of(make_packed(packing, (1, 64), (4,), BF16)) for packing in held}
    keys.add(key_of(make((1, 64), (4,), BF16)))
    assert len(keys) == 4
