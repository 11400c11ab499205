"""What people see: names that complete, and long commands that say what they do."""

import io
import json
import subprocess
import sys
import threading
import time

import flashnorm
from flashnorm.bench.timing import interleaved
from flashnorm.cli import progress
from tests.bench.test_cli import config


def test_field_dir_lists_every_public_name():
    code = "import sys, flashnorm; print(*dir(flashnorm)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.split()
    assert set(flashnorm.__all__) <= set(listed)
    assert {"fold_", "accelerate_", "original", "inspect"} <= set(listed)
    assert len(listed) == len(set(listed))


def test_field_bench_says_what_it_does_while_it_runs(tmp_path):
    asked = ["--rounds", "3", "--prefill", "1,8", "--tokens", "4", "--context", "8", "--json"]
    # However fast the machine is: steps of the first second are said too.
    code = "from flashnorm.cli import app, progress; progress.SOON = 0.0; app()"
    command = [sys.executable, "-c", code, "bench", config(tmp_path), "--no-memory", *asked]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measured"]
    lines = done.stderr.splitlines()
    for step in ("decoding", "prefill of 1", "prefill of 8", "checking flashnorm"):
        assert any(f"of 6: {step}" in line for line in lines), step


def test_field_a_group_of_timings_says_who_runs_and_how_long_it_takes():
    said = []
    runs = {"eager": lambda: time.sleep(0.01) or 0.01, ("decode", "ours"): lambda: 0.01}
    interleaved(runs, 4, settle=0.0, progress=said.append)
    assert len(said) == 2 * 5
    assert said[0] == "eager, warming up"
    assert "decode ours, warming up" in said
    assert any(line.startswith("eager, round 2 of 4, about 0 s left") for line in said)


def test_field_a_pipe_gets_lines_and_a_quick_command_says_nothing(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.1)
    for wait, least in ((0.0, 0), (0.5, 2)):
        out = io.StringIO()
        monkeypatch.setattr(sys, "stderr", out)
        with progress._lines("recording a model", 0.1 if wait else 5.0) as report:
            report(1, 4, "shard one")
            time.sleep(wait)
        lines = out.getvalue().splitlines()
        assert len(lines) >= least
        assert bool(lines) == bool(wait)
        assert all(line.endswith("shard one | 25%") for line in lines)
    assert threading.active_count() < 50
