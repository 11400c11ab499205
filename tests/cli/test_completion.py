"""The tab key: what a shell is offered, how soon, and that the offers are what commands take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app, completion


def offered(line: str, shell: str = "bash") -> list[str]:
    """What the command offers for the last word of a line, as a shell asks."""
    words = line.split(" ")
    asked = {"_FLASHNORM_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    asked |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return CliRunner().invoke(app, [], prog_name="flashnorm", env=asked).output.split()


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("flashnorm insp", ["inspect"]),
        ("flashnorm doc", ["doctor"]),
        ("flashnorm inspect m --quie", ["--quiet"]),
        ("flashnorm bench m --dtype ", ["bf16", "fp32", "fp16"]),
        ("flashnorm eval m --dtype bf", ["bf16"]),
        ("flashnorm bench m --variants eager,c", ["eager,compile"]),
        ("flashnorm eval m --variants folded,", ["folded,original", "folded,accelerated"]),
        ("flashnorm bench m --engines o", ["openvino"]),
        ("flashnorm eval m --tasks founding_p", ["founding_perplexity"]),
        ("flashnorm inspect ", []),  # paths: the shell's own completion
        ("flashnorm bench m --out ", []),
    ],
)
def test_what_is_offered(line, names):
    assert offered(line) == names


def test_the_offers_are_what_the_commands_take():
    from flashnorm.bench import models, records
    from flashnorm.engines import evaluation_records

    assert records.VARIANTS == completion.BENCH_VARIANTS
    assert tuple(models.DTYPES) == completion.DTYPES
    assert evaluation_records.VARIANTS == completion.EVAL_VARIANTS


def test_the_shipped_tasks_are_offered():

    shipped = {
        file.stem for file in (Path(flashnorm.__file__).parent / "data/tasks").glob("*.yaml")
    }
    assert set(completion.TASKS) == shipped


def test_the_engines_are_offered():
    from flashnorm.bench.engines import children

    assert set(completion.ENGINES) == set(children.KINDS)


def test_nothing_heavy_is_imported_for_it():
    code = (
        "import sys; from flashnorm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    asked = {"_FLASHNORM_COMPLETE": "complete_bash", "COMP_WORDS": "flashnorm bench m --dtype "}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked, "COMP_CWORD": "4"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split("\n")[:4] == ["bf16", "fp32", "fp16", "[]"], done.stderr


@pytest.fixture
def command(tmp_path):
    """A directory with the command `flashnorm` of this source tree."""
    file = tmp_path / "bin" / "flashnorm"
    file.parent.mkdir()
    file.write_text(f"#!{sys.executable}\nfrom flashnorm.cli import main\nmain()\n")
    file.chmod(0o755)
    return file.parent


def script(command, shell, text, cwd):
    paths = os.pathsep.join([str(command), os.environ["PATH"]])
    home = {"PATH": paths, "PYTHONPATH": os.getcwd(), "HOME": str(cwd)}
    done = subprocess.run(
        [shell, "-c", text],
        env={**os.environ, **home},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_in_bash(command, tmp_path):
    text = (
        'eval "$(_FLASHNORM_COMPLETE=source_bash flashnorm)"; complete -p flashnorm\n'
        "COMP_WORDS=(flashnorm bench m --dtype bf); COMP_CWORD=4; _flashnorm_completion flashnorm\n"
        'echo "${COMPREPLY[@]}"'
    )
    first, second, *_ = script(command, "bash", text, tmp_path)
    assert "-o default" in first, "files, where nothing is offered"
    assert second == "bf16"


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_in_fish(command, tmp_path):
    (tmp_path / "my model").mkdir()
    text = (
        "env _FLASHNORM_COMPLETE=source_fish flashnorm | source; "
        "complete -C 'flashnorm bench m --dtype bf'; complete -C 'flashnorm inspect my'"
    )
    value, place, *_ = script(command, "fish", text, tmp_path)
    assert (value, place.replace("\\", "")) == ("bf16", "my model/")
