"""Names as people type them: spaces, ~, links, nothing at all; files where folders are expected."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flashnorm.cli import app
from tests.test_cli import error_of, llama, run

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("my home é")
    llama(folder / "a model")
    (folder / "link").symlink_to("a model")
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("name", ["a model", "a model/", "~/a model", "link", "./a model"])
def test_inspect(name, at_home):
    assert "5 of 5 norms fold" in run("inspect", name).stdout


def test_fold(at_home):
    shown = run("fold", "~/link", "~/folded é").stdout
    assert "prove it: flashnorm verify '~/link' '~/folded é'" in shown
    assert (at_home / "folded é" / "model.safetensors").is_file()
    assert not (at_home / "~").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", ""], "no model is named: the name is empty"),
        (["verify", "", "a model"], "no model is named: the name is empty"),
        (["fold", "", "x"], "a path is empty: give SRC and DST"),
        (["fold", "a model", ""], "a path is empty: give SRC and DST"),
        (["fold", "organization/model", "x"], "hf download organization/model --local-dir model"),
        (["fold", "a model", "no/such"], "does not exist"),
        (["fold", "a model/config.json", "x"], "is not a directory"),
        (["inspect", "a model/model.safetensors"], "name the directory that holds it"),
        (["tune", "--threads", "0"], "--threads takes a count of at least 1, not 0"),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments, words, at_home):
    before = sorted(at_home.iterdir())
    assert words in error_of(*arguments)
    assert sorted(at_home.iterdir()) == before


def test_only_pickle_files(tmp_path, home):
    (tmp_path / "config.json").write_bytes((home / "a model" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02" + os.urandom(64))
    assert "holds its weights as pickle files only" in " ".join(
        run("inspect", tmp_path).stdout.split()
    )
    assert "pickle" in error_of("fold", tmp_path, tmp_path / "x")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_place_that_cannot_be_written(tmp_path, home):
    tmp_path.chmod(0o500)
    assert str(tmp_path) in error_of("fold", home / "a model", tmp_path / "x")


def test_the_demo_takes_a_home(at_home, monkeypatch):
    import flashnorm.demo

    seen = []

    def run_demo(directory, *, console):
        seen.append(directory)
        raise flashnorm.FlashNormError("enough")

    monkeypatch.setattr(flashnorm.demo, "run_demo", run_demo)
    CliRunner().invoke(app, ["demo", "--directory", "~/demo"])
    assert seen == [at_home / "demo"]


def test_the_report_of_a_run_takes_a_home(at_home):
    run("run", "-q", "--report", "~/report.json", "--", "true")
    assert (at_home / "report.json").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_a_full_disk_behind_stdout_is_one_line(flags):
    code = (
        "import flashnorm; flashnorm.inspect = lambda *_, **__: flashnorm.Plan(())\n"
        "from flashnorm.cli import main; main()"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", "anything", *flags],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=180,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: OSError: [Errno 28]")
    assert done.stderr.count("\n") == 1
