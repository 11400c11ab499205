"""The norm's part alone: statistics, residual + statistics, the norm; and what is said of calls."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass

import pytest
import torch

import flashnorm
from flashnorm.errors import FlashNormError
from flashnorm.kernels import dispatch, gpu, norms
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import cached, launch, measure, skinny, ways
from flashnorm.kernels.gpu.backend import GPU, GpuBackend
from flashnorm.verification.bounds import CONFIDENCE, unit_roundoff
from tests.kernels.bounds import STEPS, assert_close, wide
from tests.kernels.cases import DTYPES, EVERY_NORM, make, random
from tests.kernels.gpu.calls import DEVICE, there

U = unit_roundoff(torch.float32)


def assert_statistics(x, norm, eps, s, mean):
    """Within sums in float32 of n numbers, and the rounding of the mean itself."""
    x = x.double().reshape(-1, x.shape[-1])
    center = x.mean(-1) if norm.centers else torch.zeros(len(x), dtype=torch.float64)
    variance = (x - center[:, None]).square().mean(-1)
    expected = torch.rsqrt(variance + eps)
    relative = (2 * CONFIDENCE * x.shape[1] ** 0.5 + STEPS) * U
    assert s.dtype == torch.float32
    assert ((s.cpu().double() / expected - 1).abs() <= relative).all()
    assert (mean is None) == (not norm.centers)
    if mean is not None:
        limit = relative * variance.sqrt() + 2 * U * center.abs()
        assert ((mean.cpu().double() - center).abs() <= limit).all()


@pytest.mark.parametrize("norm", [norms.RMS, norms.LAYER], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype, norm):
    for n, mean, eps in itertools.product((1, 67, 512), (0.7, 300.0), (1e-5, 0.5)):
        x = (random(2, 3, n, dtype=torch.float64, scale=2) + mean).to(dtype)
        for given in (x, x[:, ::2], x.transpose(0, 1)):
            s, found = gpu.row_scale(given.to(DEVICE), norm, eps)
            assert_statistics(given, norm, eps, s, found)


@pytest.mark.parametrize("norm", [norms.RMS, norms.LAYER], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_and_its_statistics(dtype, norm):
    """The statistics are those of the rounded sum, which is what the next layer reads."""
    for n in (1, 67, 512):
        x, residual = random(2, 3, n, dtype=dtype, scale=2), random(2, n, 3, dtype=dtype, seed=1)
        residual = residual.transpose(1, 2)
        total, s, mean = gpu.add_stats(x.to(DEVICE), residual.to(DEVICE), norm, 1e-5)
        assert torch.equal(total.cpu(), x + residual)
        assert_statistics(x + residual, norm, 1e-5, s, mean)


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_alone(dtype, norm):
    """norm(x) · g + β is the operation with the identity for a weight."""
    for n, options in itertools.product(
        (1, 67), ({}, {"gain": True}, {"gain": True, "norm_bias": True})
    ):
        call = make((3, n), (n,), dtype, norm, **options)._replace(
            weights=[torch.eye(n, dtype=dtype)]
        )
        found = gpu.normalize(there(call))
        assert_close(call, [found.cpu()], what=(n, options), first=False)


def test_no_rows_and_no_statistics():
    empty = torch.empty(0, 8, device=DEVICE)
    assert gpu.row_scale(empty, norms.RMS, 0.0)[0].shape == (0,)
    assert [t.shape for t in gpu.add_stats(empty, empty, norms.LAYER, 0.0)] == [(0, 8), (0,), (0,)]
    assert gpu.normalize(Call(empty, ())).shape == (0, 8)
    with pytest.raises(FlashNormError, match="norm 'dyt' has no statistics"):
        gpu.row_scale(empty, norms.DYT, 0.0)


CALL = there(make((2, 3, 16), (5,), torch.float32, gain=True, bias=True))
REFUSED = {
    "float64": (wide(CALL), "x is torch.float64; the kernels take float32, bfloat16 and float16"),
    "meta": (CALL._replace(x=CALL.x.to("meta")), "x is on meta, not on a GPU"),
    "features": (
        CALL._replace(x=torch.ones(1, 2**16 + 1, device=DEVICE)),
        "x has 65537 features; the kernels take 1 to 65536",
    ),
    "no weight": (CALL._replace(weights=[]), "there is no weight"),
    "half": (CALL._replace(x=CALL.x.half()), "x is torch.float16 on .* and a weight torch.float32"),
    "columns": (CALL._replace(weights=[CALL.weights[0].T]), "a weight's rows are not dense"),
    "residual": (
        CALL._replace(output_residual=torch.ones(2, 3, 5).bfloat16()),
        "the residual is not like x: torch.bfloat16",
    ),
    "bias": (CALL._replace(biases=[CALL.biases[0].double()]), "a bias is torch.float64 on"),
    "gain": (CALL._replace(gain=torch.ones(32, device=DEVICE)[::2]), "gain is .* it must be dense"),
}


@pytest.mark.parametrize(("call", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_refuse(call, reason):
    assert gpu.why_not(CALL) is None
    said = gpu.why_not(call)
    assert said is not None
    assert re.search(reason, said)


def test_without_triton_a_reason_says_so(monkeypatch):
    monkeypatch.setattr(ways, "find_spec", lambda name: None)
    ways._no_triton.cache_clear()
    try:
        assert "triton is not installed" in gpu.why_not(CALL)
    finally:
        ways._no_triton.cache_clear()


def test_the_default_way_says_why():
    for dtype, rows, way in (
        (torch.bfloat16, 16, "skinny"),
        (torch.bfloat16, 17, "matmul"),
        (torch.float32, 1, "skinny"),
        (torch.float32, 2, "matmul"),
    ):
        found = gpu.choose(there(make((rows, 8), (5,), dtype)))
        assert found.way == way
        assert f"{rows} row" in found.reason
        assert "not measured" in found.reason


def test_a_measured_way_and_tile_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHNORM_GPU_CACHE", str(tmp_path / "deep" / "gpu.json"))
    call, device = there(make((3, 40), (9,), torch.bfloat16)), launch.device_of(CALL.x)
    tile = launch.Tile(16, 32, 16, 1, 2, 2)
    cached.forget()
    try:
        assert gpu.choose(call).way == "skinny"
        cached.store(device, {cached.key_of(call): cached.Entry("skinny", "2 µs", tile)})
        other = call._replace(gain=call.x[0])
        cached.store(device, {cached.key_of(other): cached.Entry("gemm", "3 µs")})
        assert ways.tile_for(call, "skinny") == tile
        assert ways.tile_for(call, "gemm") is None
        assert gpu.choose(call) == gpu.Way("skinny", "measured fastest on this card (2 µs)")
        assert gpu.choose(other).way == "gemm"
        # The next power of two of rows is another measurement; 4 rows are the same one.
        assert cached.key_of(call) == cached.key_of(there(make((4, 40), (9,), torch.bfloat16)))
        assert ways.tile_for(there(make((5, 40), (9,), torch.bfloat16)), "skinny") is None
        for given in (call, other):
            plain = make((3, 40), (9,), torch.bfloat16)._replace(
                gain=None if given.gain is None else given.gain.cpu()
            )
            assert_close(plain, [y.cpu() for y in gpu.run(given)], first=True)
    finally:
        monkeypatch.undo()
        cached.forget()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2, "devices": {}}',
        '{"version": 1, "devices": {"a": {"b": {"way": "fast", "note": ""}}}}',
        '{"version": 1, "devices": {"a": {"b": {"way": "gemm", "note": "", "tile": {"x": 1}}}}}',
    ],
)
def test_a_file_of_something_else_is_not_used(text, tmp_path, monkeypatch, caplog):
    file = tmp_path / "gpu.json"
    file.write_text(text)
    monkeypatch.setenv("FLASHNORM_GPU_CACHE", str(file))
    cached.forget()
    with caplog.at_level("WARNING", "flashnorm"):
        assert cached.find(CALL, launch.HOPPER) is None
    assert "is not a file of measurements, so defaults are used" in caplog.text
    monkeypatch.undo()
    cached.forget()


def test_the_file_is_plain_json(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHNORM_GPU_CACHE", str(tmp_path / "gpu.json"))
    cached.forget()
    file = cached.store(launch.HOPPER, {"a key": cached.Entry("matmul", "1 µs")})
    assert json.loads(file.read_text()) == {
        "version": 1,
        "devices": {launch.HOPPER.name: {"a key": {"way": "matmul", "note": "1 µs", "tile": None}}},
    }
    monkeypatch.undo()
    cached.forget()


def test_measuring_keeps_the_fastest_way(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHNORM_GPU_CACHE", str(tmp_path / "gpu.json"))
    cached.forget()
    calls = [there(make((rows, 40), (9,), torch.bfloat16)) for rows in (2, 2)]
    ran, times = [], iter([3.0, 1.0, 2.0])

    def timer(function):
        ran.append(function())
        return next(times)

    try:
        entry = measure.measure(calls, timer)
        assert entry == cached.Entry("gemm", "skinny 1500.00 µs, gemm 500.00 µs, matmul 1000.00 µs")
        assert [len(found) for found in ran] == [2, 2, 2]
        assert gpu.choose(calls[0]).way == "gemm"
        with pytest.raises(FlashNormError, match="cannot be measured on a GPU: x is"):
            measure.measure([wide(calls[0])], timer)
    finally:
        monkeypatch.undo()
        cached.forget()


@dataclass(frozen=True, eq=False)
class Interpreted(GpuBackend):
    """The kernels where the interpreter runs them."""

    def claims(self, x):
        return x.device.type == DEVICE


@pytest.fixture
def interpreted():
    made = Interpreted(**{**vars(GPU), "name": "interpreted", "device": DEVICE})
    dispatch.register(made)
    yield made
    dispatch.unregister(made)


def test_dispatch_asks_the_kernels_and_says_the_way(interpreted):
    call = there(make((3, 40), (9,), torch.bfloat16, gain=True))
    choice = flashnorm.explain(call.x, call.weights[0], gain=call.gain, gain_offset=1.0)
    assert choice.backend == "interpreted"
    assert choice.reason.startswith(f"skinny: {gpu.choose(call).reason}; ")
    assert torch.equal(dispatch.norm_linear(call)[0], gpu.run(call, "skinny")[0])
    double = wide(call)
    refused = flashnorm.explain(double.x, double.weights[0])
    assert refused == dispatch.Choice("reference", gpu.why_not(double))


def test_what_is_said_of_a_call_is_what_runs(interpreted):
    few = there(make((16, 2048), (2048, 512, 512), torch.bfloat16))
    said = dispatch.explain(few).reason
    assert said.endswith("; 96 programs of 64 columns, n in 2 parts")
    outputs = [few.x.new_empty(16, w.shape[0]) for w in few.weights]
    steps = list(skinny.steps(few, outputs, launch.HOPPER))
    assert [step.grid for step in steps] == [(48, 2)]
    many = there(make((20, 16), (8, 8), torch.bfloat16))
    assert "side by side" not in dispatch.explain(many).reason
    whole = torch.cat(list(many.weights))
    beside = many._replace(weights=whole.split([8, 8]))
    assert dispatch.explain(beside).reason.endswith("side by side and are one product")
