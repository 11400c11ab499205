"""Two folds to one target at once, and file systems that lock nothing."""

from __future__ import annotations

import pytest
from filelock import FileLock

from flashnorm import fold_checkpoint
from flashnorm.checkpoint.workdir import open_workdir

from .helpers import llama_plan, llama_tensors, write_checkpoint
from .test_refusals import refused


@pytest.fixture
def src(tmp_path):
    return write_checkpoint(tmp_path / "src", llama_tensors(2), shards=3)


def test_two_runs_at_once(src):
    with open_workdir(src.parent / "dst", "another fold"):
        refused(src, "another process is writing .*dst.flashnorm-partial: wait for it to end")
    assert [path.name for path in src.parent.glob(".*")] == [".dst.flashnorm-partial"]


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), NotImplementedError()])
def test_a_file_system_without_locks(src, monkeypatch, error):
    def acquire(*args, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    fold_checkpoint(src, src.parent / "dst", plan=llama_plan(2))
    assert sorted(path.name for path in src.parent.iterdir()) == ["dst", "src"]


# --- the source directory --------------------------------------------------------------------
