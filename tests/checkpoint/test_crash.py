"""Killed at any moment, a fold resumes and ends with the same bytes; a full disk leaves nothing."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from flashnorm import CheckpointError, fold_checkpoint
from flashnorm.checkpoint import fold, stream

from .helpers import llama_plan, llama_tensors, snapshot, write_checkpoint

LAYERS, HIDDEN, SHARDS = 6, 512, 4
PLAN = llama_plan(LAYERS, hidden=HIDDEN)
# The server imports torch once and forks a fresh process for every fold that is to be killed.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "flashnorm.checkpoint"])


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    tensors = llama_tensors(LAYERS, hidden=HIDDEN, inner=1376, vocab=1024)
    return write_checkpoint(tmp_path_factory.mktemp("crash") / "src", tensors, shards=SHARDS)


@pytest.fixture(scope="module")
def wanted(src):
    fold_checkpoint(src, src.parent / "whole", plan=PLAN)
    return snapshot(src.parent / "whole")


@pytest.fixture
def dst(src):
    target = src.parent / "dst"
    yield target
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(partial(target), ignore_errors=True)


def partial(dst):
    return dst.parent / f".{dst.name}.flashnorm-partial"


def lock(dst):
    return partial(dst).with_name(f"{partial(dst).name}.lock")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fold_until(src, dst, limit):
    """Fold, and die when `limit` bytes are done."""

    def progress(done, total, name):
        if done >= limit:
            die()

    fold_checkpoint(src, dst, plan=PLAN, progress=progress)


def fold_until_killed(src, dst):
    """Fold, and stay in the middle of it."""

    def progress(done, total, name):
        if done >= total // 2:
            time.sleep(120)

    fold_checkpoint(src, dst, plan=PLAN, progress=progress)


def fold_until_call(src, dst, name, count, after):
    """Fold, and die before or after the `count`-th call of `os.name`."""
    real, calls = getattr(os, name), [0]

    def counted(*args, **options):
        calls[0] += 1
        if calls[0] == count and not after:
            die()
        value = real(*args, **options)
        if calls[0] == count:
            die()
        return value

    setattr(os, name, counted)
    fold_checkpoint(src, dst, plan=PLAN)


def run_killed(target, *args, delay=None):
    """Run in a fresh process until it dies, by itself or by us after `delay` seconds."""
    process = SERVER.Process(target=target, args=args)
    process.start()
    if delay is not None:
        time.sleep(delay)
        process.kill()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def resumed(src, dst, wanted):
    before = snapshot(src)
    fold_checkpoint(src, dst, plan=PLAN)
    assert snapshot(dst) == wanted
    assert not partial(dst).exists()
    assert not lock(dst).exists()
    assert snapshot(src) == before


@pytest.mark.parametrize("seed", range(12))
def test_killed_at_a_random_byte(src, dst, wanted, seed):
    total = sum(file.stat().st_size for file in src.glob("*.safetensors"))
    rng = random.Random(seed)
    for limit in sorted(rng.randrange(total) for _ in range(rng.choice([1, 1, 2]))):
        assert run_killed(fold_until, src, dst, limit) == -signal.SIGKILL
        assert partial(dst).is_dir()
        assert not dst.exists()
    resumed(src, dst, wanted)


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_a_random_time(src, dst, wanted, seed):
    delay = random.Random(seed).uniform(0, 0.5)
    code = run_killed(fold_until, src, dst, 1 << 60, delay=delay)
    assert code in (0, -signal.SIGKILL)
    if dst.exists():
        assert snapshot(dst) == wanted, "the target appears complete or not at all"
        shutil.rmtree(dst)
    resumed(src, dst, wanted)


def test_a_second_run_is_refused_until_the_first_one_is_gone(src, dst, wanted):
    process = SERVER.Process(target=fold_until_killed, args=(src, dst))
    process.start()
    end = time.monotonic() + 60
    while not list(partial(dst).glob("*.safetensors")) and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=r"another process is writing .*: wait for it to end"):
        fold_checkpoint(src, dst, plan=PLAN)
    assert list(partial(dst).glob("*.safetensors"))
    process.kill()
    process.join(60)
    assert lock(dst).exists()  # a file that nobody holds
    resumed(src, dst, wanted)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("name", "count"),
    [("replace", n) for n in (1, 2, 5, 6)] + [("fsync", n) for n in (1, 2, 5, 8)]
    + [("unlink", 1), ("rename", 1)],
)  # fmt: skip
def test_killed_between_two_steps(src, dst, wanted, name, count, after):
    assert run_killed(fold_until_call, src, dst, name, count, after) == -signal.SIGKILL
    if dst.exists():
        assert (name, after) == ("rename", True)
        assert snapshot(dst) == wanted
        shutil.rmtree(dst)
    resumed(src, dst, wanted)


def kill_in_the_third_shard(src, dst):
    sizes = [file.stat().st_size for file in sorted(src.glob("*.safetensors"))]
    run_killed(fold_until, src, dst, sum(sizes[:2]) + sizes[2] // 2)
    assert sorted(file.name for file in partial(dst).glob("*.safetensors")) == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2)
    ]


def test_a_resumed_run_keeps_finished_shards(src, dst, wanted):
    kill_in_the_third_shard(src, dst)
    done = {file.name: file.stat().st_mtime_ns for file in partial(dst).glob("*.safetensors")}
    resumed(src, dst, wanted)
    assert {name: (dst / name).stat().st_mtime_ns for name in done} == done


def test_a_shard_of_another_size_is_written_again(src, dst, wanted):
    kill_in_the_third_shard(src, dst)
    shard = partial(dst) / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    resumed(src, dst, wanted)


@pytest.mark.parametrize("journal", [b"", b"[]", b'{"fingerprint": "another", "notes": {}}'])
def test_a_strange_journal_starts_over(src, dst, wanted, journal):
    kill_in_the_third_shard(src, dst)
    (partial(dst) / ".flashnorm-journal.json").write_bytes(journal)
    shard = partial(dst) / "model-00001-of-00004.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    (partial(dst) / "stray").mkdir()
    resumed(src, dst, wanted)


@pytest.mark.parametrize("change", ["mode", "plan", "source"])
def test_another_fold_starts_over(tmp_path, src, change):
    copy, dst = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(src, copy)
    kill_in_the_third_shard(copy, dst)
    options = {"plan": PLAN, "strict": change == "mode"}
    if change == "plan":
        options["plan"] = type(PLAN)(PLAN.sites[3:])
    if change == "source":
        tensors = llama_tensors(LAYERS, hidden=HIDDEN, inner=1376, vocab=1024, seed=1)
        shutil.rmtree(copy)
        write_checkpoint(copy, tensors, shards=SHARDS)
    fold_checkpoint(copy, dst, **options)
    fold_checkpoint(copy, tmp_path / "fresh", **options)
    assert snapshot(dst) == snapshot(tmp_path / "fresh")


def test_an_interrupt_keeps_the_partial_directory(src, dst, wanted):
    def interrupt(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(src, dst, plan=PLAN, progress=interrupt)
    assert list(partial(dst).glob("*.safetensors"))
    resumed(src, dst, wanted)


# --- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB; the folded checkpoint has about 40."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_little_space_is_seen_before(src, small_disk):
    match = r"not enough space for .*: \d+ bytes \(0.0\d GB\) are needed, \d+ bytes .* are free"
    with pytest.raises(CheckpointError, match=match):
        fold_checkpoint(src, small_disk / "dst", plan=PLAN)
    assert not list(small_disk.iterdir())


def test_the_disk_becomes_full(src, small_disk, monkeypatch):
    monkeypatch.setattr(fold, "free_bytes", lambda path: 1 << 60)
    with pytest.raises(CheckpointError, match=r"the disk became full while .* bytes .* needed"):
        fold_checkpoint(src, small_disk / "dst", plan=PLAN)
    assert not list(small_disk.iterdir())


def test_finished_shards_count_as_space(src, dst, wanted, monkeypatch):
    kill_in_the_third_shard(src, dst)
    total = sum(file.stat().st_size for file in src.iterdir())
    monkeypatch.setattr(fold, "free_bytes", lambda path: total * 3 // 4)
    resumed(src, dst, wanted)


def test_copies_without_the_kernel_are_the_same(src, dst, wanted, monkeypatch):
    def refuse(*args):
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    resumed(src, dst, wanted)


@pytest.mark.parametrize("workers", [1, 7])
def test_any_number_of_workers_writes_the_same(src, dst, wanted, monkeypatch, workers):
    monkeypatch.setattr(stream, "WORKERS", workers)
    monkeypatch.setattr(stream, "AHEAD", workers)
    resumed(src, dst, wanted)
