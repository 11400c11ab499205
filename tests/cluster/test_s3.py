"""A server of S3 on this machine as source and target, here and on a cluster."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import time

import pytest

from flashnorm import CheckpointError, fold_checkpoint
from flashnorm.checkpoint import remote
from tests.checkpoint import cases
from tests.checkpoint.helpers import llama_plan, llama_tensors, snapshot, write_checkpoint
from tests.test_cli import run as command

from .nodes import cluster

pytest.importorskip("moto", reason="`make cluster` installs it")
s3fs = pytest.importorskip("s3fs", reason="`make cluster` installs it")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*(folded tensors are left out|became subnormal)"),
]
BUCKET = "models"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The server, and what a process has to know of it."""
    port = free_port()
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    server = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture
def s3(environment, monkeypatch):
    logging.getLogger("s3fs").setLevel(logging.CRITICAL)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget()
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    if not fs.exists(BUCKET):
        fs.mkdir(BUCKET)
    yield fs
    fs.rm(BUCKET, recursive=True)
    forget()


def forget():
    """File systems keep what the environment was when they were made."""
    remote._connected.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def put(fs, path, place):
    fs.put(str(path), f"{BUCKET}/{place}", recursive=True)
    return f"s3://{BUCKET}/{place}"


def stored(fs, place):
    root = f"{BUCKET}/{place}"
    return {
        name.removeprefix(f"{root}/"): hashlib.sha256(fs.cat_file(name)).hexdigest()
        for name in fs.find(root)
    }


@pytest.mark.parametrize("name", cases.NAMES)
def test_the_bytes_are_those_of_a_directory(s3, tmp_path, name):
    src, options = cases.make(tmp_path / "src", name)
    fold_checkpoint(src, tmp_path / "dst", **options)
    wanted = snapshot(tmp_path / "dst")
    url = put(s3, src, "src")
    fold_checkpoint(url, tmp_path / "from", **options)
    assert snapshot(tmp_path / "from") == wanted
    fold_checkpoint(url, f"s3://{BUCKET}/both", **options)
    assert stored(s3, "both") == wanted
    with pytest.raises(CheckpointError, match=f"s3://{BUCKET}/both exists already"):
        fold_checkpoint(src, f"s3://{BUCKET}/both", **options)


def test_on_a_cluster(s3, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    for name in cases.NAMES:
        src, options = cases.make(tmp_path / name, name)
        put(s3, src, name)
        fold_checkpoint(src, tmp_path / f"{name}-dst", **options)
    with cluster(monkeypatch, tmp_path) as (nodes, _):
        for name in cases.NAMES:
            _, options = cases.make(tmp_path / f"{name}-plan", name)
            options |= {"engine": "ray", "ray_address": nodes.address}
            fold_checkpoint(f"s3://{BUCKET}/{name}", f"s3://{BUCKET}/dst-{name}", **options)
            assert stored(s3, f"dst-{name}") == snapshot(tmp_path / f"{name}-dst")


def test_an_interrupted_run_goes_on(s3, tmp_path):
    src, options = cases.make(tmp_path / "src", "compat")
    fold_checkpoint(src, tmp_path / "dst", **options)
    seen = set()

    def progress(done, total, name):
        seen.add(name)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(src, f"s3://{BUCKET}/dst", progress=progress, **options)
    assert not s3.exists(f"{BUCKET}/dst/config.json")
    first = f"{BUCKET}/dst/model-00001-of-00004.safetensors"
    before = s3.info(first)["LastModified"]
    time.sleep(1.1)  # the server counts seconds
    fold_checkpoint(src, f"s3://{BUCKET}/dst", **options)
    assert stored(s3, "dst") == snapshot(tmp_path / "dst")
    assert s3.info(first)["LastModified"] == before


def test_an_upload_of_several_parts_in_bounded_memory(s3, environment, tmp_path):
    """Four parts of 50 MB are held at once; with all that s3fs would hold it is 870 MB."""
    tensors = llama_tensors(1, hidden=1024, inner=4096, vocab=80_000)
    src = write_checkpoint(tmp_path / "src", tensors, shards=1)
    del tensors
    size = (src / "model.safetensors").stat().st_size
    url = put(s3, src, "large/src")
    code = (
        "import sys\n"
        "from flashnorm import fold_checkpoint\n"
        "from tests.checkpoint.helpers import llama_plan\n"
        "from tests.cluster.test_s3 import peak\n"
        "plan = llama_plan(1, hidden=1024)\n"
        "import s3fs, transformers, flashnorm.checkpoint.fold\n"
        "before = peak()\n"
        "fold_checkpoint(sys.argv[1], sys.argv[2], plan=plan)\n"
        "print(peak() - before)\n"
    )
    place = f"s3://{BUCKET}/large-dst"
    done = subprocess.run(
        [sys.executable, "-c", code, url, place],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    fold_checkpoint(src, tmp_path / "dst", plan=llama_plan(1, hidden=1024))
    assert stored(s3, "large-dst") == snapshot(tmp_path / "dst")
    assert size > 350e6
    assert int(done.stdout) < 700e6


def peak():
    """The most memory that this process has had, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# --- refusals ---------------------------------------------------------------------------------


def error_of(*arguments):
    lines = command("fold", *arguments, code=2).stderr.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_bucket_that_there_is_not(s3, tmp_path):
    error = error_of("s3://nowhere/model", tmp_path / "dst")
    assert error == "error: there is nothing at s3://nowhere/model"


def test_a_target_without_a_bucket(s3, tmp_path):
    src, _ = cases.make(tmp_path / "src", "compat")
    assert "error: s3://nowhere/model" in error_of(src, "s3://nowhere/model")


def test_a_server_that_does_not_answer(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    forget()
    start = time.monotonic()
    error = error_of(f"s3://{BUCKET}/src", tmp_path / "dst")
    assert f"s3://{BUCKET}/src: the store answered EndpointConnectionError: Could not con" in error
    assert time.monotonic() - start < 60


def test_without_credentials(s3, tmp_path, monkeypatch):
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    src, _ = cases.make(tmp_path / "src", "compat")
    forget()
    error = error_of(src, f"s3://{BUCKET}/dst")
    assert "the store answered NoCredentialsError" in error
    assert error.endswith("give credentials, by the environment or the files of the store's tools")
