"""What is said where Ray is not installed, or was not asked for as it has to be."""

from __future__ import annotations

import sys

import pytest

from flashnorm import CheckpointError, fold_checkpoint, verify_weights
from tests.checkpoint.helpers import llama_plan, llama_tensors, write_checkpoint
from tests.test_cli import run as command


@pytest.fixture
def src(tmp_path):
    return write_checkpoint(tmp_path / "src", llama_tensors(2), shards=2)


def test_without_ray(src, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    match = r"--engine ray needs Ray: pip install 'flashnorm\[ray\]'"
    with pytest.raises(CheckpointError, match=match):
        fold_checkpoint(src, tmp_path / "dst", plan=llama_plan(2), engine="ray")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_engines_that_there_are_not(src, tmp_path):
    with pytest.raises(ValueError, match="engine is 'dask': give one of local, ray"):
        fold_checkpoint(src, tmp_path / "dst", engine="dask")
    with pytest.raises(ValueError, match="engine is 'dask': give one of local, ray"):
        verify_weights(src, src, engine="dask")


def test_models_are_not_run_on_a_cluster(src):
    error = command("verify", src, src, "--engine", "ray", code=2).stderr
    assert "--engine ray compares weights, with --quick" in error
