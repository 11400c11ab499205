"""`--html FILE`: a page beside what a command prints, whole or not at all, and never instead."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app
from flashnorm.errors import FlashNormError
from flashnorm.html import write as writing
from flashnorm.html.write import check, write
from flashnorm.plan import Plan

from ..bench.tiny import config
from ..test_cli import llama

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama(folder / "a")
    llama(folder / "c", seed=1)
    flashnorm.fold_checkpoint(folder / "a", folder / "b")
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


def text_of(file: Path) -> str:
    """The page, without its tags; nothing else lies beside it."""
    assert [each.name for each in file.parent.iterdir() if "part" in each.name] == []
    return re.sub(r"<[^>]+>|\s+", " ", file.read_text("utf-8"))


def test_inspect_writes_a_page_beside_its_json(models, tmp_path):
    file = tmp_path / "plan.html"
    result = run("inspect", models / "a", "--json", "--html", file)
    plan = Plan.from_json(json.loads(result.stdout))
    assert file.read_text("utf-8") == plan.to_html("a")
    size = f"{file.stat().st_size / 1e3:,.0f} kB"
    assert result.stderr.endswith(f"written: {file}, {size}\n")
    assert (
        run("inspect", models / "a", "--html", file).stdout == run("inspect", models / "a").stdout
    )


def test_verify_writes_a_page_of_either_verdict(models, tmp_path):
    file = tmp_path / "page.html"
    run("verify", models / "a", models / "b", "--html", file)
    assert "Equal: float64 error" in text_of(file)
    result = run("verify", models / "a", models / "c", "--json", "--html", file, code=1)
    first = json.loads(result.stdout)["first_wrong_layer"]["path"]
    assert "NOT equal" in text_of(file)
    assert f"The first module that differs is {first}" in text_of(file)


def test_bench_writes_a_page(tmp_path):
    small = (
        "--rounds",
        "1",
        "--tokens",
        "2",
        "--context",
        "8",
        "--prefill",
        "4",
        "--dtype",
        "fp32",
    )
    file = tmp_path / "page.html"
    result = run("bench", config(tmp_path / "tiny"), *small, "--cache", "1000000", "--json",
                 "--html", file)  # fmt: skip
    row = json.loads(result.stdout)["measured"][0]["rows"][0]
    assert f"{row['milliseconds']['median']:.2f}" in text_of(file)


# What cannot be written.


def nowhere(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "page.html")
    return {
        "there is no directory": tmp_path / "missing" / "page.html",
        "no directory": tmp_path / "file" / "page.html",
        "it is no file": tmp_path / "folder",
        "it is no file, name": tmp_path / "fifo",
        "cannot be written": tmp_path / "link",
        "/dev/null cannot be written": Path("/dev/null"),
    }


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(flashnorm, "inspect", lambda *_, **__: pytest.fail("it has begun"))
    for words, file in nowhere(tmp_path).items():
        result = run("inspect", "anything", "--html", file, code=2)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert words in result.stderr
        assert str(file) in result.stderr
    assert not Path("/dev/null").is_file()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fifo", "file", "folder", "link"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FlashNormError, match=r"cannot be written \(Permission denied\)"):
        check(tmp_path / "page.html")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_disk_that_fills_up_loses_no_result(models, tmp_path, monkeypatch, as_json):
    expected = run("inspect", models / "a", *as_json).stdout
    file = tmp_path / "page.html"
    file.write_text("the page of before")
    monkeypatch.setattr(Path, "write_bytes", full)
    result = run("inspect", models / "a", *as_json, "--html", file, code=2)
    assert result.stdout == expected  # and no second JSON with the error
    (line,) = [each for each in result.stderr.splitlines() if each.startswith("error: ")]
    assert line == (
        f"error: {file} cannot be written (No space left on device): name a file where there is "
        "room and permission"
    )
    assert text_of(file) == "the page of before"


def test_a_real_limit_leaves_nothing_behind(tmp_path):
    """The kernel refuses the bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            FlashNormError, match=r"page\.html cannot be written \(File too large\)"
        ):
            write(tmp_path / "page.html", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_page_appears_whole(tmp_path, monkeypatch):
    """Until it is renamed, the old one is there; a link stays a link; the mode is the usual one."""
    old, link = tmp_path / "old.html", tmp_path / "link.html"
    old.write_text("before")
    link.symlink_to(old)
    seen = []
    replace = Path.replace

    def watched(self: Path, target: str) -> Path:
        seen.append((self.read_text(), old.read_text(), self.parent == tmp_path))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write(link, "after")
    assert seen == [("after", "before", True)]
    assert link.is_symlink()
    assert old.read_text() == "after"
    write(tmp_path / "new.html", "n")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new.html").stat().st_mode & 0o777 == 0o666 & ~mask


def test_half_a_character_stops_nothing(tmp_path):
    plan = Plan((), notes=("a \ud800 b",))
    write(tmp_path / "page.html", plan.to_html())
    assert "a ? b" in text_of(tmp_path / "page.html")


def test_pages_are_loaded_when_one_is_asked_for():
    code = (
        "import sys, flashnorm, flashnorm.plan as p\n"
        "assert not [m for m in sys.modules if 'jinja2' in m or 'flashnorm.html' in m]\n"
        "p.Plan(()).to_html(); assert 'flashnorm.html.page' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert writing.__name__ == "flashnorm.html.write"
