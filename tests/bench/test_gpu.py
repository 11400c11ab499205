"""The GPU benchmark on a CPU: its stages, its files, its exit codes and what it does when cut."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import correctness, models, operations, ours, scaled, tune
from benchmarks.gpu.budget import Budget, OutOfTime
from benchmarks.gpu.nouns import Run, Settings, Shape
from benchmarks.gpu.store import Store
from flashnorm.bench.nouns import COMPILE, EAGER, OURS_COMPILED, Timing
from tests.kernels.cases import make

CEILING = {"bytes": 4e12, "operations": 8e14}


def dry(out, *more):
    return gpu.main(["--dry-run", "--out", str(out), *more])


def results(out):
    return json.loads((out / "results.json").read_text("utf-8"))


def test_a_dry_run_writes_everything_and_a_resumed_one_measures_nothing_again(tmp_path, capsys):
    assert dry(tmp_path) == 0
    first = results(tmp_path)
    assert set(first["stages"]) >= {"correctness", "operations", "decode", "scaled"}
    assert not any(row["wrong"] for row in first["stages"]["correctness"])
    text = (tmp_path / "tables.md").read_text("utf-8")
    assert "A dry run on a CPU" in text
    assert "| 32→64 GLU | 16 |" in text
    assert "32 of 32" in text
    assert "| 32→48, int8 | 16 |" in text
    assert (tmp_path / "operations.csv").read_text("utf-8").count("\n") == 1 + 4
    with pytest.raises(SystemExit, match="give --resume to go on"):
        dry(tmp_path)
    assert dry(tmp_path, "--resume") == 0
    assert results(tmp_path)["stages"] == first["stages"]
    assert "exit code 0" in capsys.readouterr().out


def test_a_wrong_kernel_is_listed_and_not_timed(tmp_path, monkeypatch):
    right = ours.run

    def wrong(call, way=ours.CHOSEN):
        return [y * 1.1 if call.activation and len(call.x) == 16 else y for y in right(call, way)]

    monkeypatch.setattr(ours, "run", wrong)
    assert dry(tmp_path, "--stages", "operations") == gpu.WRONG
    rows = results(tmp_path)["stages"]["operations"]
    bad = [row for row in rows if row["excluded"]]
    assert [(row["shape"], row["rows"]) for row in bad] == [("32→64 GLU", 16)]
    assert "times what rounding explains" in bad[0]["excluded"]
    assert "times what rounding explains" in (tmp_path / "tables.md").read_text("utf-8")


def test_a_wrong_product_makes_the_exit_code(tmp_path, monkeypatch):
    right = scaled.scaled_product
    monkeypatch.setattr(scaled, "scaled_product", lambda *args: right(*args) * 1.1)
    assert dry(tmp_path, "--stages", "scaled") == gpu.WRONG
    assert "off its own terms" in (tmp_path / "tables.md").read_text("utf-8")


def test_a_wrong_check_makes_the_exit_code(tmp_path, monkeypatch):
    right = ours.run
    monkeypatch.setattr(ours, "run", lambda call, way: [y + 1 for y in right(call, way)])
    assert dry(tmp_path, "--stages", "correctness") == gpu.WRONG
    assert "WRONG: way=chosen" in (tmp_path / "tables.md").read_text("utf-8")


def test_a_run_without_time_says_what_is_missing(tmp_path):
    assert dry(tmp_path, "--minutes", "0.001", "--stages", "operations") == gpu.CUT
    assert "out of time" in results(tmp_path)["incomplete"]["operations"]
    assert "| operations |  | out of time" in (tmp_path / "tables.md").read_text("utf-8")


def test_sigterm_ends_a_run_with_what_it_has(tmp_path, monkeypatch):
    right, seen = ours.run, []

    def killed(call, way):
        seen.append(way)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return right(call, way)

    monkeypatch.setattr(ours, "run", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert dry(tmp_path, "--stages", "correctness", "operations") == gpu.CUT
    found = results(tmp_path)
    assert len(found["stages"]["correctness"]) == 2
    assert found["incomplete"] == {"correctness": "interrupted"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_has_its_own_time_and_never_more_than_the_run():
    budget = Budget(100)
    with budget.stage(10):
        assert 9 < budget.left() <= 10
        with pytest.raises(OutOfTime, match="11 s were needed"):
            budget.check(11)
    with budget.stage(1000):
        assert 90 < budget.left() <= 100


def test_results_of_another_card_are_not_continued(tmp_path):
    Store(tmp_path, False).begin({"card": "one"})
    with pytest.raises(SystemExit, match="holds results of one, and this is two"):
        Store(tmp_path, True).begin({"card": "two"})


def test_roofline_counts_each_byte_and_operation_once():
    """By hand: 4096→6144 reads 48 MiB of weights; at 4096 rows it is 206 GFLOP."""
    one, limit = operations.roofline(Shape(4096, 6144), 1, CEILING)
    assert limit == "memory"
    assert one == pytest.approx((4096 * 6144 + 4096 + 6144) * 2 / 4e12)
    many, limit = operations.roofline(Shape(4096, 6144), 4096, CEILING)
    assert limit == "arithmetic"
    assert many == pytest.approx(2 * 4096 * 4096 * 6144 / 8e14)
    gated, _ = operations.roofline(Shape(4096, 6144, True), 1, CEILING)
    assert gated == pytest.approx((4096 * 6144 + 4096 + 3072) * 2 / 4e12)


def test_the_speedup_is_over_the_best_other_side():
    times = {"ours": 2e-6, "torch norm + matmul": 5e-6, "torch.compile": 3e-6, "matmul alone": 1e-6}
    timings = {name: Timing((value, value, 9.0)) for name, value in times.items()}
    found = operations.weighed(Shape(64, 64), 1, timings, CEILING)
    assert found["best"] == "torch.compile"
    assert found["speedup"] == pytest.approx(1.5)


@pytest.mark.parametrize(("change", "least"), [(float("nan"), 1e300), (0.5, 1.0)])
def test_errors_are_weighed_in_parts_of_their_bound(change, least):
    call = make((3, 64), (32,), torch.bfloat16)
    found = ours.run(call)
    expected = correctness.Expected(call, ours.LIBRARY)
    assert expected.share(found) <= 1
    found[0][1, 5] += change
    assert expected.share(found) > least


def test_compiled_variants_are_measured_beside_the_others(tmp_path, monkeypatch):
    """On a CPU, with a torch.compile that does nothing: all stages of a model in one go."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    monkeypatch.setattr(models, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(models, "ROUNDS", 1)
    run = Run(Settings(tmp_path, "cpu", models=("tiny",)), Store(tmp_path, False), Budget(100))
    run.ceiling = CEILING
    models.model(run, "tiny")
    (row,) = run.store.rows("decode")
    assert set(row["milliseconds"]) == {EAGER, "flashnorm", COMPILE, OURS_COMPILED}
    assert row["failed"] == {}
    assert row["checks"][OURS_COMPILED]["equal"] == 32
    assert set(run.store.find("prefill", tokens=128)["milliseconds"]) == set(row["milliseconds"])
    assert run.store.find("compiled", model="tiny", complete=True)


@dataclass(frozen=True)
class Tile:
    columns: int = 8
    depth: int = 128
    warps: int = 4
    stages: int = 3
    splits: int = 1


def test_tuning_walks_to_the_fastest_tile_and_compiles_it_before():
    compiled = {Tile()}

    def timer(tile):
        assert tile in compiled
        return 1 + abs(tile.columns - 32) + abs(tile.stages - 4) + 10 * (tile.splits - 1)

    found, seconds = tune.search(Tile(), timer, lambda: True, compiled.update)
    assert (found, seconds) == (Tile(columns=32, stages=4), 1)


def test_tuning_keeps_what_it_has_when_its_time_is_over():
    calls = []

    def timer(tile):
        calls.append(tile)
        return 1 / len(calls)

    found, seconds = tune.search(Tile(), timer, lambda: len(calls) < 3)
    assert (found, seconds) == (calls[2], 1 / 3)


def test_tuning_skips_what_cannot_run_and_ignores_noise():
    found, seconds = tune.search(Tile(), lambda tile: 1 if tile == Tile() else 0.99, lambda: True)
    assert (found, seconds) == (Tile(), 1)
    far = tune.search(Tile(), lambda tile: 1 if tile == Tile() else math.inf, lambda: True)
    assert far == (Tile(), 1)


def test_the_calls_of_a_model_are_tuned_before_those_with_many_rows():
    found = list(tune.tasks(("llama-3.2-1b",)))
    assert tune.Task(2048, (2048, 512, 512), 1, gain=True) in found
    assert tune.Task(2048, (128256,), 1, "none") in found
    assert {task.rows for task in found[-6:]} == {4096}


INTERPRETED = """
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.gpu import correctness, ours, tune
from benchmarks.gpu.baseline_kernels import rms_norm, silu_mul
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.nouns import Run, Settings
from benchmarks.gpu.store import Store
from flashnorm.kernels.gpu import cached, launch
from tests.kernels.cases import make

x, gain = torch.randn(3, 200), torch.rand(200) + 0.5
torch.testing.assert_close(rms_norm(x, gain, 1e-5), F.rms_norm(x, (200,), gain, 1e-5))
gate, up = x.chunk(2, -1)
torch.testing.assert_close(silu_mul(x), F.silu(gate) * up)

call = make((3, 40), (24,), torch.float32, gain=True)
for way in ours.WAYS:
    for tile in (None, launch.Tile(16, 16, 32, 1, 2)) if way in ours.TILED else (None,):
        assert not correctness.Expected(call, way).wrong(ours.run(call, way, tile)), (way, tile)

tune.SECONDS = 0.5
folder = Path(sys.argv[1])
run = Run(Settings(folder, "cpu"), Store(folder, False), Budget(2))
task = tune.Task(64, (32, 32), 16, gain=True, activation="silu")
with torch.no_grad():
    found = tune._tuned(run, task)
call = tune._calls(task, "cpu")[0]
entry = cached.find(call, launch.device_of(call.x))
assert entry.way == found["way"] == min(found["microseconds"], key=found["microseconds"].get)
assert set(found["microseconds"]) == {"skinny", "matmul"}
"""


def test_kernels_of_both_sides_run_and_tuning_leaves_what_it_found(tmp_path):
    """In Triton's interpreter, whose times are none, but are in a file as those of a GPU are."""
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "FLASHNORM_GPU_CACHE": str(tmp_path / tune.FILE),
    }
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert "rows<=16" in (tmp_path / tune.FILE).read_text("utf-8")
