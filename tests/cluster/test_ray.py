"""Three nodes on this machine: the bytes of the local fold, whatever becomes of a node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import flashnorm
from flashnorm import CheckpointError, FoldError, fold_checkpoint, verify_weights
from flashnorm.checkpoint import cluster as engine
from flashnorm.checkpoint import target
from tests.checkpoint import cases
from tests.checkpoint.helpers import llama_plan, llama_tensors, snapshot, write_checkpoint
from tests.test_cli import run as command

from .nodes import LAYERS, ROOT, SHARDS, cluster, raylet
from .slow import SlowValues

ray = pytest.importorskip("ray", reason="`make cluster` installs it")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*(folded tensors are left out|became subnormal)"),
]
PLAN = llama_plan(LAYERS)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as found:
        yield found


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def three(patch, marks):
    """One cluster for the tests that leave it whole."""
    with cluster(patch, marks) as found:
        yield found[0].address


@pytest.fixture
def src(tmp_path):
    return write_checkpoint(tmp_path / "src", llama_tensors(LAYERS), shards=SHARDS)


@pytest.fixture
def wanted(src, tmp_path):
    fold_checkpoint(src, tmp_path / "wanted", plan=PLAN)
    return snapshot(tmp_path / "wanted")


def on(address):
    return {"engine": "ray", "ray_address": address}


def left_over(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("name", cases.NAMES)
def test_the_bytes_are_those_of_the_local_fold(three, tmp_path, name):
    src, options = cases.make(tmp_path / "src", name)
    fold_checkpoint(src, tmp_path / "here", **options)
    told = []
    options["progress"] = lambda *step: told.append(step)
    fold_checkpoint(src, tmp_path / "there", **options, **on(three))
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")
    assert left_over(tmp_path) == []
    assert {done for done, total, _ in told} >= {told[-1][1]}
    assert told[-1][0] == told[-1][1]
    assert not ray.is_initialized()


def test_every_node_works(three, src, tmp_path, wanted, monkeypatch, marks):
    monkeypatch.setattr(target, "Values", SlowValues)
    for file in marks.iterdir():
        file.unlink()
    fold_checkpoint(src, tmp_path / "dst", plan=PLAN, **on(three))
    assert snapshot(tmp_path / "dst") == wanted
    assert len({*marks.iterdir()}) >= 3
    assert str(os.getpid()) not in {file.name for file in marks.iterdir()}


def test_a_node_that_is_killed_in_mid_run(patch, src, tmp_path, wanted, monkeypatch, marks):
    monkeypatch.setattr(target, "Values", SlowValues)
    monkeypatch.setattr(engine, "BEAT", 0.1)
    for file in marks.iterdir():
        file.unlink()
    with cluster(patch, marks, pause=0.3) as (nodes, others):
        killed, raylets = [], {raylet(node): node for node in others}

        def progress(done, total, name):
            """Kill the first node of which a worker is in the middle of a shard."""
            parents = {parent_of(file.name) for file in marks.iterdir()}
            for parent in [*parents & raylets.keys()][: 0 if killed else 1]:
                killed.append(parent)
                nodes.remove_node(raylets[parent], allow_graceful=False)

        with pytest.warns(UserWarning, match=r"\d+ shards lost their worker and were done again"):
            fold_checkpoint(
                src, tmp_path / "dst", plan=PLAN, progress=progress, **on(nodes.address)
            )
        assert killed
    assert snapshot(tmp_path / "dst") == wanted
    assert left_over(tmp_path) == []


def parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def test_a_driver_that_is_killed_goes_on(three, src, tmp_path, wanted):
    dst = tmp_path / "dst"
    code = [sys.executable, "-m", "tests.cluster.killed", str(src), str(dst), three]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = tmp_path / ".dst.flashnorm-partial"
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert 0 < len(kept) < SHARDS
    assert not dst.exists()
    fold_checkpoint(src, dst, plan=PLAN, **on(three))
    assert snapshot(dst) == wanted
    assert {name: (dst / name).stat().st_mtime_ns for name in kept} == kept
    assert left_over(tmp_path) == []


def test_a_cluster_of_this_machine_ends_with_its_driver(src, tmp_path, wanted, monkeypatch):
    """Without an address Ray is started here; a killed driver takes it along."""
    monkeypatch.setenv("FLASHNORM_TEST_PAUSE", "0.05")
    monkeypatch.setenv("FLASHNORM_TEST_MARKS", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    name = f"FLASHNORM_TEST_{os.getpid()}_{time.monotonic_ns()}"
    code = [sys.executable, "-m", "tests.cluster.killed", str(src), str(tmp_path / "dst"), ""]
    done = subprocess.run(
        code, cwd=ROOT, env={**os.environ, name: "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    end = time.monotonic() + 180  # its agents look for it now and then
    while (alive := with_variable(name)) and time.monotonic() < end:
        time.sleep(0.2)
    assert alive == []
    fold_checkpoint(src, tmp_path / "dst", plan=PLAN)  # here, after a run there
    assert snapshot(tmp_path / "dst") == wanted


def with_variable(name):
    """Processes with a variable in their environment, but for zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if name.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes()[:200])
        except OSError:
            continue
    return found


def test_an_error_of_a_worker_names_the_shard(three, tmp_path):
    tensors = llama_tensors(2, dtype=torch.float16)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = 60000
    tensors["model.layers.1.input_layernorm.weight"][0] = 60000
    src = write_checkpoint(tmp_path / "src", tensors, shards=4)
    match = r"model-0000\d-of-00004.safetensors: model.layers.1.self_attn.q_proj.weight.*overflow"
    with pytest.raises(FoldError, match=match):
        fold_checkpoint(src, tmp_path / "dst", plan=llama_plan(2), **on(three))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    assert not ray.is_initialized()


def test_workers_of_another_version_are_refused(three, src, tmp_path, monkeypatch):
    monkeypatch.setattr(flashnorm, "__version__", "0.0.1")
    with pytest.raises(CheckpointError, match=r"a worker has flashnorm .*started by 0.0.1"):
        fold_checkpoint(src, tmp_path / "dst", plan=PLAN, **on(three))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_source_that_the_workers_see_otherwise_is_refused(three, src, tmp_path, monkeypatch):
    """As where a directory of that name on another machine is not the same one."""
    real = engine.run_on_cluster

    def changed(jobs, values, report_of, address=None):
        for job in jobs[:1]:
            os.utime(src / job.name, ns=(1, 1))
        yield from real(jobs, values, report_of, address)

    monkeypatch.setattr(engine, "run_on_cluster", changed)
    with pytest.raises(CheckpointError, match=r"model-00001-.*is not the file that the plan was"):
        fold_checkpoint(src, tmp_path / "dst", plan=PLAN, **on(three))


def test_a_target_that_exists_is_refused(three, src, tmp_path):
    (tmp_path / "dst").mkdir()
    with pytest.raises(CheckpointError, match="dst exists already"):
        fold_checkpoint(src, tmp_path / "dst", plan=PLAN, **on(three))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there_is_one_line(src, tmp_path, address):
    arguments = ["fold", src, tmp_path / "dst", "--engine", "ray", "--ray-address", address]
    error = command(*arguments, code=2).stderr.strip().splitlines()[-1]
    assert f"the Ray cluster {address} cannot be reached" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_connection_of_the_program_is_used_and_stays(three, src, tmp_path, wanted):
    ray.init(address=three, log_to_driver=False)
    try:
        fold_checkpoint(src, tmp_path / "dst", plan=PLAN, engine="ray")
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert snapshot(tmp_path / "dst") == wanted


def test_weights_are_verified_on_the_cluster(three, src, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fold_checkpoint(src, tmp_path / "dst", **on(three))
    here = verify_weights(src, tmp_path / "dst").to_json()
    there = verify_weights(src, tmp_path / "dst", **on(three)).to_json()
    assert here.pop("seconds")
    assert there.pop("seconds")
    assert there == here
    assert there["ok"]
    broken = sorted((tmp_path / "dst").glob("*.safetensors"))[5]
    data = bytearray(broken.read_bytes())
    data[-7] ^= 64
    broken.write_bytes(data)
    here, there = (verify_weights(src, tmp_path / "dst", **o) for o in ({}, on(three)))
    assert not there.ok
    assert [w.file for w in there.wrong] == [broken.name]
    assert there.wrong == here.wrong
