"""The process that watches a GPU benchmark: what it does when the other hangs or dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import handoff, supervise
from benchmarks.gpu.handoff import MOST_FILES, Progress, deliver
from benchmarks.gpu.supervise import Watch

SECONDS = 300  # in which something must have happened on the slowest machine
FEW = ("--stages", "ceilings", "checks", "few-rows")
SLOW = ("--rounds", "1000000")  # 2 s a row, so that no signal comes after the last of 18


def started(work: Path, *more: str) -> subprocess.Popen[str]:
    """A dry run in a process group of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--work", str(work)]
    return subprocess.Popen(
        [*command, "--out", str(work / "out"), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=SECONDS)
    return process.returncode, said


def stages(work: Path) -> dict:
    try:
        return json.loads((work / "results.json").read_text("utf-8"))["stages"]
    except (OSError, ValueError):
        return {}


def wait_for(work: Path, stage: str, count: int) -> None:
    end = time.monotonic() + SECONDS
    while len(stages(work).get(stage, ())) < count:
        assert time.monotonic() < end, stages(work).keys()
        time.sleep(0.02)


def child_of(process: subprocess.Popen[str]) -> int:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(found[0])


def test_killed_in_a_stage_and_resumed_nothing_is_lost_or_measured_again(tmp_path):
    """Both processes at once, as a machine that is taken away ends them."""
    run = started(tmp_path, *FEW, *SLOW)
    wait_for(tmp_path, "operations", 3)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    before = stages(tmp_path)
    assert 3 <= len(before["operations"]) < 18
    code, said = finished(started(tmp_path, *FEW))
    assert code == supervise.USAGE
    assert "give --resume to go on" in said
    code, said = finished(started(tmp_path, *FEW, "--resume"))
    assert code == 0, said
    after = stages(tmp_path)
    for stage, rows in before.items():
        assert after[stage][: len(rows)] == rows
    assert len(after["operations"]) == 18
    assert {row["run"] for row in after["correctness"]} == {0}
    assert said.count(" rows, bf16: ") == 18 - len(before["operations"])
    assert len(said[said.index("exit code") :]) <= 3000 + len("exit code 0\n")
    assert len(list((tmp_path / "out").iterdir())) <= MOST_FILES
    with tarfile.open(tmp_path / "out" / handoff.REST) as archive:
        assert {"operations.csv", "log.txt"} <= set(archive.getnames())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of children")
def test_a_process_that_dies_is_started_again_without_the_piece_it_died_in(tmp_path):
    run = started(tmp_path, *FEW, "--rounds", "300")
    wait_for(tmp_path, "operations", 2)
    os.kill(child_of(run), signal.SIGKILL)
    code, said = finished(run)
    assert code == supervise.CUT, said
    assert "the process ended with -9 in it; measuring goes on without it" in said
    assert len(stages(tmp_path)["operations"]) in (17, 18)
    assert "NOT MEASURED" in (tmp_path / "out" / "summary.txt").read_text("utf-8")


def test_sigterm_ends_both_with_what_was_found(tmp_path):
    run = started(tmp_path, *FEW, *SLOW)
    wait_for(tmp_path, "operations", 2)
    run.terminate()
    code, said = finished(run)
    assert code == supervise.CUT
    summary = (tmp_path / "out" / "summary.txt").read_text("utf-8")
    assert "NOT MEASURED run: interrupted" in summary
    assert said.endswith(summary)
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["stages"]
    assert found == stages(tmp_path)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A process in the place of the one that measures: a script, which finds its folder as WORK."""

    def watched(script: str, seconds: float = 60.0) -> tuple[Watch, int]:
        file = tmp_path / "fake.py"
        prelude = f"import sys; sys.path.insert(0, {str(Path.cwd())!r})\nWORK = {str(tmp_path)!r}\n"
        file.write_text(prelude + textwrap.dedent(script))
        launched = []

        def start(watch, arguments, resume):
            launched.append(resume)
            return subprocess.Popen([sys.executable, str(file), str(len(launched))])

        monkeypatch.setattr(supervise, "_started", start)
        watch = Watch(tmp_path, tmp_path / "out", seconds)
        return watch, supervise.supervise(watch, [], False)

    monkeypatch.setattr(supervise, "LEAST", 0.0)
    return watched


def test_a_piece_that_hangs_is_ended_and_its_stage_left_out(fake, monkeypatch, capsys):
    """Even in a call that listens to no signal."""
    monkeypatch.setattr(supervise, "GRACE", 0.2)
    watch, code = fake(
        """
        import signal, time
        from pathlib import Path
        from benchmarks.gpu.handoff import Progress
        if sys.argv[1] == "1":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Progress("decode", "decode, max-autotune", 0.1).write(Path(WORK))
            time.sleep(600)
        """
    )
    assert code == 0
    assert watch.skipped == {"decode": "stopped, decode, max-autotune took too long"}
    assert "measuring goes on without it" in capsys.readouterr().out


def test_a_device_that_fails_again_and_again_ends_the_run(fake):
    watch, code = fake(
        f"""
        from pathlib import Path
        from benchmarks.gpu.handoff import Progress
        Progress("few-rows", "a piece", 60.0).write(Path(WORK))
        sys.exit({supervise.BROKEN})
        """
    )
    assert code == supervise.CUT
    assert watch.skipped == {"a piece": f"the process ended with {supervise.BROKEN} in it"}


def test_files_are_copied_while_the_run_goes_on(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(supervise, "EVERY", 0.1)
    _, code = fake(
        """
        import time
        from pathlib import Path
        Path(WORK, "tables.md").write_text("half of it")
        while not Path(WORK, "out", "tables.md").exists():
            time.sleep(0.05)
        Path(WORK, "tables.md").write_text("all of it")
        """
    )
    assert code == 0
    assert (tmp_path / "out" / "tables.md").read_text() == "all of it"


def test_two_runs_in_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise.time, "sleep", lambda seconds: None)
    with supervise._alone(Watch(tmp_path, None, 1.0)):
        refused = f"another run is measuring in {tmp_path}"
        with pytest.raises(SystemExit, match=refused), supervise._alone(Watch(tmp_path, None, 1.0)):
            pass


def test_what_is_too_large_or_cannot_be_written_is_said(tmp_path, monkeypatch):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / "plot.png").write_bytes(b"x" * 100)
    (work / "tables.md").write_text("a table")
    monkeypatch.setattr(handoff, "MOST_BYTES", 99)
    failed = deliver(work, out)
    assert any("plot.png: it is larger than 0 MiB" in why for why in failed)
    assert (out / "tables.md").read_text() == "a table"
    assert not (out / "partial").exists()
    (tmp_path / "file").write_text("")
    assert "Not a directory" in deliver(work, tmp_path / "file" / "out")[0]


def test_progress_is_read_as_it_was_written(tmp_path):
    assert Progress.read(tmp_path) is None
    Progress("stage", "piece", 5.0).write(tmp_path)
    found = Progress.read(tmp_path)
    assert (found.stage, found.piece, found.seconds) == ("stage", "piece", 5.0)
    assert abs(found.since - time.time()) < 60
    (tmp_path / handoff.NOW).write_text("{")
    assert Progress.read(tmp_path) is None


def test_results_are_named_by_the_card(tmp_path):
    assert supervise._named_by_card(tmp_path) is None
    runs = [{"card": "NVIDIA H100 80GB HBM3"}]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs}))
    assert supervise._named_by_card(tmp_path).name.startswith("gpu-h100-80gb-hbm3-2")


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("benchmarks.gpu.worker.die_with", lambda parent: None)
    assert gpu.main(["--work", str(tmp_path), "--worker", "--until", "0"]) == 2
    assert "no GPU that torch can use; --dry-run" in capfd.readouterr().out
