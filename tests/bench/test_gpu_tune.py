"""Tuning the kernels for GPUs: the walk from tile to tile, and both sides in the interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from benchmarks.gpu import tune
from benchmarks.gpu.handoff import TUNED


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
from benchmarks.gpu.records import Run, Settings
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
run = Run(Settings(folder, "cpu"), Store(folder, False), Budget(2.0))
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
    pytest.importorskip("triton", reason="there is no Triton here to interpret kernels")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "FLASHNORM_GPU_CACHE": str(tmp_path / TUNED),
    }
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert "rows<=16" in (tmp_path / TUNED).read_text("utf-8")
