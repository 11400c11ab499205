"""Where files are written and who else may write there: links, races, other users, permissions."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress

import pytest

import flashnorm
from flashnorm.checkpoint import stream, workdir
from flashnorm.checkpoint.gguf import dequantized
from flashnorm.checkpoint.source import SINGLE
from flashnorm.checkpoint.workdir import open_workdir, partial_path
from flashnorm.errors import CheckpointError, FlashNormError
from flashnorm.kernels import measurements
from flashnorm.runtime.package import store
from tests.checkpoint.helpers import llama_plan, llama_tensors, snapshot, write_checkpoint

SHAPE = {"hidden": 8, "inner": 12, "vocab": 16}
PLAN = llama_plan(1, hidden=8)
posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has other permissions")


@pytest.fixture
def src(tmp_path):
    return write_checkpoint(tmp_path / "src", llama_tensors(1, **SHAPE), shards=2)


def fold(src, **options):
    return flashnorm.fold_checkpoint(src, src.parent / "dst", plan=PLAN, **options)


@pytest.fixture
def another_user(monkeypatch):
    """What lies there already belongs to somebody else than this process."""
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)


# --- the work directory ---------------------------------------------------------------------------


def test_a_link_in_place_of_the_work_directory(src, tmp_path):
    """It was emptied before, with all that it holds."""
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep" / "thesis.txt").write_text("years")
    partial_path(tmp_path / "dst").symlink_to(victim)
    with pytest.raises(CheckpointError, match="in the way, and no directory"):
        fold(src)
    assert (victim / "deep" / "thesis.txt").read_text() == "years"
    assert not (tmp_path / "dst").exists()


def test_a_link_inside_of_the_work_directory(src, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "x").write_text("x")
    work = partial_path(tmp_path / "dst")
    work.mkdir()
    (work / "link").symlink_to(victim)
    (work / f"{SINGLE}.tmp").symlink_to(victim / "x")
    fold(src)
    assert snapshot(victim).keys() == {"x"}
    assert not (tmp_path / "dst" / "link").is_symlink()


@posix
def test_a_work_directory_of_another_user(src, tmp_path, another_user):
    partial_path(tmp_path / "dst").mkdir()
    with pytest.raises(CheckpointError, match="belongs to another user: choose a target"):
        fold(src)


def test_a_link_in_place_of_the_lock(src, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("not emptied")
    work = partial_path(tmp_path / "dst")
    work.with_name(work.name + workdir.LOCK_SUFFIX).symlink_to(victim)
    with pytest.raises(CheckpointError, match="is a link, which flashnorm never makes"):
        fold(src)
    assert victim.read_text() == "not emptied"


@posix
@pytest.mark.parametrize("kind", ["link", "another user's"])
def test_a_dequantized_checkpoint_that_somebody_has_left(tmp_path, kind, request):
    """It would be taken for what a killed run has left, with whatever weights it holds."""
    file, place = tmp_path / "x.gguf", tmp_path / ".dst.flashnorm-gguf"
    file.write_bytes(b"GGUF")
    made = tmp_path / "theirs" if kind == "link" else place
    made.mkdir()
    told = file.stat()
    (made / ".flashnorm-gguf.json").write_text(
        json.dumps([file.name, told.st_size, told.st_mtime_ns])
    )
    if kind == "link":
        place.symlink_to(made)
    else:
        request.getfixturevalue("another_user")
    with (
        pytest.raises(CheckpointError, match=r"no directory|belongs to another user"),
        dequantized(file, tmp_path / "dst"),
    ):
        pytest.fail("it was taken")


def test_a_target_whose_name_is_too_long(src):
    with pytest.raises(CheckpointError, match=r"could not be (made|written)|too long"):
        flashnorm.fold_checkpoint(src, src.parent / ("x" * 250), plan=PLAN)


# --- races ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_a_target_that_appears_meanwhile(src, tmp_path, kind):
    target = tmp_path / "dst"

    def progress(*_):
        if kind == "directory":
            target.mkdir(exist_ok=True)
        elif kind == "file":
            target.write_text("mine")
        elif not target.is_symlink():
            target.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match="appeared while it was being written"):
        fold(src, progress=progress)
    assert target.is_symlink() or target.is_dir() or target.read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"]
)
def test_a_source_that_changes_while_it_is_read(src, tmp_path, name):
    """Half of one download and half of the next are no checkpoint."""

    def progress(*_):
        os.utime(src / name, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while it was being read: start again"):
        fold(src, progress=progress)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["src"]


def test_a_source_that_is_cut_while_it_is_read(src, tmp_path, monkeypatch):
    """Between its header and its tensors."""
    file, write = src / "model-00002-of-00002.safetensors", stream.write_shard

    def cut(*arguments):
        os.truncate(file, 300)
        return write(*arguments)

    monkeypatch.setattr("flashnorm.checkpoint.parts.write_shard", cut)
    with pytest.raises(CheckpointError, match="is not the file that the plan was made from"):
        fold(src)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["src"]


def test_gains_of_a_source_that_was_cut(src, monkeypatch):
    open_source = flashnorm.checkpoint.places.open_source

    def then_cut(path):
        found = open_source(path)
        for name in found.shards:
            os.truncate(path / name, 300)
        return found

    monkeypatch.setattr("flashnorm.checkpoint.places.open_source", then_cut)
    with pytest.raises(CheckpointError, match="became shorter while it was being read"):
        fold(src)


# --- links out of the source ----------------------------------------------------------------------


def test_a_link_out_of_the_checkpoint_is_not_copied(src, tmp_path):
    """What it leads to may be a secret, and the target may be published."""
    (tmp_path / "id_rsa").write_text("secret")
    (src / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match=r"notes\.txt in src is a link to .*id_rsa, outside"):
        fold(src)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["id_rsa", "src"]


def test_links_inside_of_the_checkpoint_and_of_the_cache_of_the_hub(tmp_path):
    """There every file is a link to `blobs` beside the snapshots."""
    real = write_checkpoint(tmp_path / "real", llama_tensors(1, **SHAPE))
    snapshot_, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    snapshot_.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(real.iterdir()):
        file.rename(blobs / str(number))
        (snapshot_ / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot_ / "again.json").symlink_to("tokenizer.json")
    flashnorm.fold_checkpoint(snapshot_, tmp_path / "dst", plan=PLAN)
    assert (tmp_path / "dst" / "again.json").read_text() == '{"version": "1.0"}'
    assert not any(file.is_symlink() for file in (tmp_path / "dst").iterdir())
    (snapshot_ / "more.json").symlink_to("../../../real")
    (tmp_path / "real.json").write_text("{}")
    (snapshot_ / "last.json").symlink_to("../../../real.json")
    with pytest.raises(CheckpointError, match=r"last\.json in 123 is a link"):
        flashnorm.fold_checkpoint(snapshot_, tmp_path / "other", plan=PLAN)


# --- permissions --------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_written_has_the_permissions_that_the_user_gives_new_files(src, tmp_path, mask):
    old = os.umask(mask)
    try:
        fold(src)
    finally:
        os.umask(old)
    for file in [tmp_path / "dst", *(tmp_path / "dst").iterdir()]:
        assert stat.S_IMODE(file.stat().st_mode) & mask == 0, file


@posix
def test_measurements_are_written_through_no_link_and_for_nobody_else(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "cache" / "flashnorm"
    victim.write_text("mine")
    measurements.write(folder / "cpu.json", {"version": 1})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / f"cpu.{os.getpid()}.tmp").symlink_to(victim)
    measurements.write(folder / "cpu.json", {"version": 2})
    assert victim.read_text() == "mine"
    assert measurements.read(folder / "cpu.json", 2, lambda found: found) == {"version": 2}
    (folder / "cpu.json").unlink()
    (folder / "cpu.json").symlink_to(victim)
    measurements.write(folder / "cpu.json", {"version": 3})
    assert victim.read_text() == "mine"
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


@pytest.fixture
def package(tmp_path):
    place = tmp_path / "packages" / "step"
    place.mkdir(parents=True)
    (place / store.LIBRARY).write_bytes(b"code")
    store.write(place, store.Description({"a": "b"}, ()))
    return place


@posix
def test_a_package_of_this_user_is_used(package):
    assert store.read(package, {"a": "b"}) is not None


@posix
@pytest.mark.parametrize("part", ["", store.LIBRARY, store.DESCRIPTION, ".."])
def test_a_package_that_everybody_may_write_to_is_code_of_everybody(package, part):
    place = package / part
    place.chmod(place.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(FlashNormError, match=r"is not used: every user may write to"):
        store.read(package, {"a": "b"})


@posix
def test_a_package_in_a_place_like_tmp(package):
    package.parent.chmod(0o1777)
    assert store.read(package, {"a": "b"}) is not None


@posix
def test_a_package_of_another_user(package, another_user):
    if os.stat(package).st_uid == 0:
        os.chown(package, 12345, -1)
    with pytest.raises(FlashNormError, match=r"is not used: .* belongs to another user"):
        store.read(package, {"a": "b"})


@posix
@pytest.mark.parametrize("part", ["", store.LIBRARY])
def test_a_package_behind_a_link(package, part):
    place = package / part
    moved = package.parent / "moved"
    place.rename(moved)
    place.symlink_to(moved)
    with pytest.raises(FlashNormError, match=r"is not used: .* is a link"):
        store.read(package, {"a": "b"})


@posix
def test_packages_are_made_where_nobody_else_may_write(tmp_path):
    with store.being_made(tmp_path / "packages" / "step") as made:
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_workdir_of_this_user_goes_on(tmp_path):
    with suppress(KeyboardInterrupt), open_workdir(tmp_path / "dst", "a") as work:
        work.slot("x").path.write_text("x")
        work.finish("x", 1, 3)
        raise KeyboardInterrupt
    with open_workdir(tmp_path / "dst", "a") as work:
        assert work.is_done("x", 1)
        assert work.note("x") == 3
