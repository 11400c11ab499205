"""Object stores as source and target, on the one that fsspec keeps in memory."""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from flashnorm import CheckpointError, FoldError, fold_checkpoint, inspect
from flashnorm.checkpoint import remote, spool, store
from flashnorm.checkpoint.remote import Remote, place_of
from tests.test_cli import llama
from tests.test_cli import run as command

from . import cases
from .helpers import SINGLE, llama_plan, llama_tensors, snapshot, write_checkpoint

fsspec = pytest.importorskip("fsspec")
JOURNAL = ".flashnorm-journal.json"


@pytest.fixture
def fs():
    return fsspec.filesystem("memory")


@pytest.fixture
def root(fs):
    """A place of its own in the store that all tests share."""
    name = f"/{uuid.uuid4().hex}"
    yield name
    if fs.exists(name):
        fs.rm(name, recursive=True)


@pytest.fixture
def spools(tmp_path, monkeypatch):
    """Where shards lie on their way."""
    place = tmp_path / "spools"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert not list(place.iterdir()), "something was left on the disk"


def put(fs, path, place):
    for file in path.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{place}/{file.relative_to(path)}", file.read_bytes())
    return f"memory:/{place}"


def stored(fs, place):
    found = fs.find(place) if fs.exists(place) else []
    return {
        name.removeprefix(f"{place}/"): hashlib.sha256(fs.cat_file(name)).hexdigest()
        for name in found
    }


def refused(match, *args, error=CheckpointError, **options):
    with pytest.raises(error, match=match):
        fold_checkpoint(*args, **options)


@pytest.mark.filterwarnings("ignore:.*(folded tensors are left out|became subnormal)")
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", cases.NAMES)
def test_the_bytes_are_those_of_a_directory(tmp_path, fs, root, spools, name, shards):
    src, options = cases.make(tmp_path / "src", name, shards)
    fold_checkpoint(src, tmp_path / "dst", **options)
    wanted = snapshot(tmp_path / "dst")
    url = put(fs, src, f"{root}/src")
    fold_checkpoint(url, tmp_path / "from", **options)
    assert snapshot(tmp_path / "from") == wanted
    fold_checkpoint(src, f"memory:/{root}/to", **options)
    assert stored(fs, f"{root}/to") == wanted
    fold_checkpoint(f"{url}/", f"memory:/{root}/both", **options)
    assert stored(fs, f"{root}/both") == wanted
    assert stored(fs, f"{root}/src") == snapshot(src)


def test_the_plan_of_a_remote_source_is_that_of_a_directory(tmp_path, fs, root, spools):
    src, _ = cases.make(tmp_path / "src", "compat")
    found = fold_checkpoint(put(fs, src, f"{root}/src"), tmp_path / "dst")
    assert found == inspect(src)
    assert found.folded


def test_only_headers_and_gains_are_read_before_the_shards(tmp_path, fs, root, monkeypatch):
    tensors = llama_tensors(2, hidden=256, inner=1024, vocab=4096)
    src = write_checkpoint(tmp_path / "src", tensors, shards=2)
    url, asked = put(fs, src, f"{root}/src"), [0]
    real = Remote.read

    def counted(self, name, start, length):
        asked[0] += length
        return real(self, name, start, length)

    monkeypatch.setattr(Remote, "read", counted)
    before = sum(f.stat().st_size for f in src.glob("*") if f.suffix != ".safetensors")
    monkeypatch.setattr(store.Objects, "on_disk", stop_at_once)
    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(url, tmp_path / "dst", plan=llama_plan(2, hidden=256))
    assert asked[0] < before + 2 * 65536 + 16 * 512 < sum(f.stat().st_size for f in src.iterdir())


def stop_at_once(self, name, facts):
    raise KeyboardInterrupt


# --- it appears complete or not at all --------------------------------------------------------


def interrupted(src, url, options, after):
    """Fold until `after` shards are done."""
    seen = []

    def progress(done, total, name):
        if name not in seen:
            seen.append(name)
        if len(seen) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(src, url, progress=progress, **options)


def test_an_interrupted_run_goes_on(tmp_path, fs, root, spools):
    src, options = cases.make(tmp_path / "src", "compat")
    fold_checkpoint(src, tmp_path / "dst", **options)
    place = f"{root}/dst"
    interrupted(src, f"memory:/{place}", options, after=2)
    left = stored(fs, place)
    assert JOURNAL in left
    assert "config.json" not in left
    done = [name for name in left if name.endswith("of-00004.safetensors")]
    assert len(done) == 3  # the third is there, but nobody has taken it for done
    before = {name: fs.info(f"{place}/{name}")["created"] for name in done}
    fold_checkpoint(src, f"memory:/{place}", **options)
    assert stored(fs, place) == snapshot(tmp_path / "dst")
    after = {name: fs.info(f"{place}/{name}")["created"] for name in done}
    assert [before[name] == after[name] for name in sorted(done)] == [True, True, False]


@pytest.mark.parametrize("what", ["bytes", "gone"])
def test_a_finished_shard_that_is_another_now_is_written_again(tmp_path, fs, root, what):
    src, options = cases.make(tmp_path / "src", "compat")
    fold_checkpoint(src, tmp_path / "dst", **options)
    place = f"{root}/dst"
    interrupted(src, f"memory:/{place}", options, after=2)
    first = f"{place}/model-00001-of-00004.safetensors"
    size = fs.info(first)["size"]
    fs.rm_file(first)
    if what == "bytes":
        fs.pipe_file(first, bytes(size))
    fold_checkpoint(src, f"memory:/{place}", **options)
    assert stored(fs, place) == snapshot(tmp_path / "dst")


def test_another_fold_starts_over(tmp_path, fs, root):
    src, options = cases.make(tmp_path / "src", "compat")
    interrupted(src, f"memory:/{root}/dst", options, after=3)
    options["plan"] = type(options["plan"])(options["plan"].sites[2:])
    fold_checkpoint(src, tmp_path / "dst", **options)
    fold_checkpoint(src, f"memory:/{root}/dst", **options)
    assert stored(fs, f"{root}/dst") == snapshot(tmp_path / "dst")


def test_a_run_that_ended_before_its_journal_was_removed(tmp_path, fs, root, monkeypatch):
    src, options = cases.make(tmp_path / "src", "compat")
    fold_checkpoint(src, tmp_path / "dst", **options)
    real = Remote.remove

    def stop(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(Remote, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(src, f"memory:/{root}/dst", **options)
    monkeypatch.setattr(Remote, "remove", real)
    assert stored(fs, f"{root}/dst").keys() == {*snapshot(tmp_path / "dst"), JOURNAL}
    changed = {**options, "strict": True}
    refused("exists already", src, f"memory:/{root}/dst", **changed)
    fold_checkpoint(src, f"memory:/{root}/dst", **options)
    assert stored(fs, f"{root}/dst") == snapshot(tmp_path / "dst")


def test_an_error_leaves_nothing(tmp_path, fs, root, spools):
    tensors = llama_tensors(2, dtype=torch.float16)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = 60000
    tensors["model.layers.1.input_layernorm.weight"][0] = 60000
    src = write_checkpoint(tmp_path / "src", tensors, shards=4)
    url = put(fs, src, f"{root}/src")
    refused("overflow", url, f"memory:/{root}/dst", error=FoldError, plan=llama_plan(2))
    assert stored(fs, f"{root}/dst") == {}


def test_config_is_written_last(tmp_path, fs, root, monkeypatch):
    src, options = cases.make(tmp_path / "src", "compat")
    written, real = [], Remote.write

    def write(self, name, data):
        written.append((name, {*self.listing()}))
        real(self, name, data)

    monkeypatch.setattr(Remote, "write", write)
    fold_checkpoint(src, f"memory:/{root}/dst", **options)
    name, there = written[-1]
    assert name == "config.json"
    assert there | {"config.json"} == {*stored(fs, f"{root}/dst"), JOURNAL}


def test_two_runs_at_once(tmp_path, fs, root):
    """Whoever began first ends, and leaves what is the other's."""
    src, options = cases.make(tmp_path / "src", "compat")
    place, began = f"memory:/{root}/dst", []

    def progress(done, total, name):
        if not began:
            began.append(True)
            interrupted(src, place, options, after=3)
            began.append({*stored(fs, f"{root}/dst")})

    refused("another process is writing", src, place, progress=progress, **options)
    assert {*stored(fs, f"{root}/dst")} >= began[1]
    fold_checkpoint(src, place, **options)


# --- refusals ---------------------------------------------------------------------------------


def test_a_target_that_exists_is_refused(tmp_path, fs, root):
    src, options = cases.make(tmp_path / "src", "compat")
    fs.pipe_file(f"{root}/dst/notes.txt", b"mine")
    refused("dst exists already: remove it", src, f"memory:/{root}/dst", **options)
    assert [*stored(fs, f"{root}/dst")] == ["notes.txt"]
    fs.pipe_file(f"{root}/dst/{JOURNAL}", b"not a journal of ours")
    refused("dst exists already: remove it", src, f"memory:/{root}/dst", **options)
    fs.rm_file(f"{root}/dst/{JOURNAL}")
    fs.rm_file(f"{root}/dst/notes.txt")
    interrupted(src, f"memory:/{root}/dst", options, after=1)
    fs.pipe_file(f"{root}/dst/notes.txt", b"mine")
    refused("holds notes.txt, which no fold wrote", src, f"memory:/{root}/dst", **options)
    assert fs.cat_file(f"{root}/dst/notes.txt") == b"mine"
    url = put(fs, src, f"{root}/src")
    refused("is the source, or lies inside of it", url, url, **options)
    refused("is the source, or lies inside of it", url, f"{url}/folded", **options)
    (tmp_path / "taken").mkdir()
    refused("taken exists already", url, tmp_path / "taken", **options)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (None, "there is nothing at memory://"),
        (("remove", "config.json"), "has no config.json: not a checkpoint"),
        (("remove", SINGLE), "has neither model.safetensors nor"),
        (("rename", SINGLE, "pytorch_model.bin"), "holds its weights as pickle files only"),
        (("cut", SINGLE), "model.safetensors is truncated: its header claims"),
        (("zero", SINGLE), "model.safetensors is truncated: 0 bytes"),
        (("page", SINGLE), "is a page that a server sent instead"),
        (("add", "a/../../evil"), "which is not a plain path"),
        (("add", "back\\slash"), "which is not a plain path"),
    ],
)
def test_sources_that_are_no_checkpoint(tmp_path, fs, root, spools, change, match):
    src, options = cases.make(tmp_path / "src", "compat", 1)
    url = f"memory:/{root}/src"
    if change is not None:
        put(fs, src, f"{root}/src")
        what, name = f"{change[0]}", f"{root}/src/{change[1]}"
        data = fs.cat_file(name) if what != "add" else b""
        if what == "add":
            fs.store[name] = fs.store[f"{root}/src/config.json"]
        else:
            fs.rm_file(name)
        new = {"cut": data[:-1], "zero": b"", "page": b"<!doctype html>" + b" " * 900}
        if what in new:
            fs.pipe_file(name, new[what])
        if what == "rename":
            fs.pipe_file(f"{root}/src/{change[2]}", data)
    refused(match, url, tmp_path / "dst", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spools", "src"]
    if what_is_added := [name for name in fs.store if name.startswith(f"{root}/src/")]:
        for name in what_is_added:
            del fs.store[name]


@pytest.mark.parametrize("when", ["planned", "downloaded"])
def test_a_source_that_changes_is_refused(tmp_path, fs, root, spools, monkeypatch, when):
    """Between the plan and the shards, and while a shard is on its way."""
    src, options = cases.make(tmp_path / "src", "compat", 1)
    url, name = put(fs, src, f"{root}/src"), f"{root}/src/{SINGLE}"

    def change():
        tensors = load(fs.cat_file(name))
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
        fs.pipe_file(name, save(tensors, metadata={"format": "pt"}))

    if when == "planned":
        real = store.Objects.on_disk

        def on_disk(self, *args):
            change()
            return real(self, *args)

        monkeypatch.setattr(store.Objects, "on_disk", on_disk)
    else:
        real = Remote.download

        def download(self, what, *args):
            real(self, what, *args)
            if what == SINGLE:
                change()

        monkeypatch.setattr(Remote, "download", download)
    refused("is not the file that the plan was made from", url, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


def test_names_that_are_no_place():
    refused("names no directory of a store", "s3://", "dst")
    refused("names no directory of a store", "src", "simplecache::memory://a")
    refused("names no directory of a store", "memory://a/../b", "dst")
    refused("nosuch://a/b cannot be read: Protocol not known: nosuch", "nosuch://a/b", "dst")
    assert place_of("file:///a/b/../c") == Path("/a/c")
    assert place_of("C:/a") == Path.cwd() / "C:/a"
    assert place_of("s3://bucket/a/") == Remote("s3://bucket/a")


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    remote._connected.cache_clear()
    refused(r"needs fsspec: pip install 'flashnorm\[remote\]'", "memory://x/y", "dst")


def test_without_the_package_of_a_store(monkeypatch):
    pytest.importorskip("fsspec")
    remote._connected.cache_clear()

    def missing(url, **options):
        raise ImportError("Install thatfs to access That")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    refused(r"needs a package .*Install thatfs.*'flashnorm\[remote\]'", "that://x/y", "dst")
    remote._connected.cache_clear()


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (
            PermissionError("Access Denied"),
            "answered PermissionError: Access Denied; the store ref",
        ),
        (type("NoCredentialsError", (Exception,), {})("none"), "; give credentials, by the env"),
        (TimeoutError("first\nsecond"), "answered TimeoutError: first$"),
        (RuntimeError(), "memory://.*: the store answered RuntimeError$"),
    ],
)
def test_errors_of_a_store_are_one_line(tmp_path, fs, monkeypatch, error, match):
    def fail(self, *args, **options):
        raise error

    monkeypatch.setattr(type(fs), "find", fail)
    refused(match, "memory://some/where", tmp_path / "dst")


def test_an_upload_that_fails_leaves_nothing(tmp_path, fs, root, spools, monkeypatch):
    src, options = cases.make(tmp_path / "src", "compat")
    real, count = type(fs).put_file, [0]

    def put_file(self, *args, **rest):
        count[0] += 1
        if count[0] == 3:
            raise ConnectionResetError("reset by peer")
        return real(self, *args, **rest)

    monkeypatch.setattr(type(fs), "put_file", put_file)
    refused("answered ConnectionResetError: reset by peer", src, f"memory:/{root}/dst", **options)
    assert stored(fs, f"{root}/dst") == {}


def test_an_upload_that_is_cut_is_seen(tmp_path, fs, root, monkeypatch):
    src, options = cases.make(tmp_path / "src", "compat")
    real = type(fs).put_file

    def put_file(self, path, name, **rest):
        real(self, path, name, **rest)
        fs.pipe_file(name, fs.cat_file(name)[:-1])

    monkeypatch.setattr(type(fs), "put_file", put_file)
    refused("were uploaded", src, f"memory:/{root}/dst", **options)


def test_no_room_for_a_shard_on_its_way(tmp_path, fs, root, monkeypatch):
    src, options = cases.make(tmp_path / "src", "compat", 1)
    url = put(fs, src, f"{root}/src")
    nothing = type("Usage", (), {"free": 10})
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda path: nothing)
    refused("10 are free: make room, or set TMPDIR", url, f"memory:/{root}/dst", **options)


def test_what_a_killed_worker_has_left_is_removed(spools, monkeypatch):
    monkeypatch.setattr(spool, "YOUNG", -1.0)
    (spools / f"{spool.PREFIX}old").mkdir()
    (spools / f"{spool.PREFIX}old" / "shard").write_text("half")
    with spool.spool(1) as first, spool.spool(1) as second:
        assert {path.name for path in spools.iterdir()} == {first.name, second.name}


def test_memory_is_that_of_some_chunks(tmp_path, fs, root, monkeypatch):
    """Chunks of a download: never more than a few at once."""
    monkeypatch.setattr(remote, "CHUNK_BYTES", 4096)
    src, _ = cases.make(tmp_path / "src", "compat", 1)
    url, sizes, real = put(fs, src, f"{root}/src"), [], type(fs).cat_file

    def cat_file(self, path, start=None, end=None, **rest):
        data = real(self, path, start=start, end=end, **rest)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(type(fs), "cat_file", cat_file)
    remote.Remote(url).download(SINGLE, (src / SINGLE).stat().st_size, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == (src / SINGLE).read_bytes()
    assert max(sizes) == 4096
    assert len(sizes) > 10


def test_the_command_reads_urls(tmp_path):
    error = command("fold", f"file://{tmp_path}/none", f"{tmp_path}/dst", code=2).stderr
    assert f"{tmp_path}/none is not a directory" in error
    done = command("fold", "nosuch://a/b", "dst", "--engine", "local", "--json", code=2)
    assert json.loads(done.stdout)["error"].startswith("nosuch://a/b cannot be read")
    error = command("fold", "src", "dst", "--engine", "dask", code=2).stderr
    assert "there is no engine dask: give one of local, ray" in error


def test_the_command_folds_between_stores(tmp_path, fs, root):
    src = llama(tmp_path / "src")
    fold_checkpoint(src, tmp_path / "dst")
    done = command("fold", put(fs, src, f"{root}/src"), f"memory:/{root}/dst")
    assert stored(fs, f"{root}/dst") == snapshot(tmp_path / "dst")
    assert "is written" in done.stdout
    assert "flashnorm verify" not in done.stdout
