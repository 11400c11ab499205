"""`flashnorm bench` as a shell sees it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import flashnorm
from flashnorm.bench.records import EAGER, FORWARD, GENERATE, OURS, PREFILL
from flashnorm.cli import app

from .tiny import accelerates, config

SMALL = ("--rounds", "2", "--tokens", "4", "--context", "8", "--prefill", "1,16,4096")
CACHE = ("--cache", "1000000")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "140"})
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture
def ours(monkeypatch):
    """flashnorm's own, or a stand-in that changes nothing where it is not there yet."""
    if not accelerates():
        monkeypatch.setattr(flashnorm, "accelerate_", lambda model: model, raising=False)


@pytest.mark.usefixtures("ours")
def test_everything_is_measured_and_written(tmp_path):
    file = config(tmp_path / "tiny")
    result = run(
        file, *SMALL, *CACHE, "--dtype", "fp32", "--no-memory", "--json", "--out", tmp_path / "out"
    )
    data = json.loads(result.stdout)
    (found,) = data["measured"]
    assert {check["variant"]: check["equal"] for check in found["checks"]} == {EAGER: 4, OURS: 4}
    assert all(0 < check["pass_error"] < 1e-5 for check in found["checks"])
    assert all(0 < check["decode_error"] < 1e-5 for check in found["checks"])
    rows = {(row["kind"], row["tokens"], row["variant"]): row for row in found["rows"]}
    places = [(GENERATE, 1), (FORWARD, 1), (PREFILL, 1), (PREFILL, 16)]
    assert set(rows) == {(*place, name) for place in places for name in (EAGER, OURS)}
    assert all(row["milliseconds"]["rounds"] == 2 for row in rows.values())
    assert rows[FORWARD, 1, EAGER]["speedup"] == 1
    assert [(fail["variant"], fail["step"]) for fail in found["failures"]] == [
        (EAGER, "prefill of 4096")
    ]
    assert data["machine"]["torch"]
    assert json.loads((tmp_path / "out.json").read_text())["measured"] == data["measured"]
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("# tiny\n")
    assert "the model takes 124 tokens" in text
    assert str(tmp_path / "out.md") in data["files"]


def test_the_plot_is_written_or_its_absence_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(flashnorm, "accelerate_", lambda model: model, raising=False)
    result = run(
        config(tmp_path), *SMALL, *CACHE, "--no-memory", "--json", "--out", tmp_path / "out"
    )
    data = json.loads(result.stdout)
    if (tmp_path / "out.png").exists():
        assert len(data["files"]) == 3
    else:
        assert "flashnorm[bench]" in data["notes"][-1]


def test_a_variant_that_raises_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(model):
        raise ValueError("no kernels\nfor this")

    monkeypatch.setattr(flashnorm, "accelerate_", broken, raising=False)
    result = run(config(tmp_path), *SMALL, *CACHE, "--no-memory")
    assert "ValueError: no kernels for this" in result.stdout
    assert "decode, forward loop" in result.stdout


def test_a_variant_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    def wrong(model):
        model.model.layers[0].mlp = __import__("torch").nn.Identity()
        return model

    monkeypatch.setattr(flashnorm, "accelerate_", wrong, raising=False)
    result = run(config(tmp_path), *SMALL, *CACHE, "--no-memory", "--json")
    (found,) = json.loads(result.stdout)["measured"]
    assert "not timed" in found["failures"][-1]["error"]
    assert {row["variant"] for row in found["rows"]} == {EAGER}
    assert {check["variant"] for check in found["checks"]} == {EAGER, OURS}


def test_memory_of_a_process_and_of_a_pass(tmp_path):
    result = run(
        config(tmp_path), *SMALL, *CACHE, "--variants", "eager", "--dtype", "fp32", "--json"
    )
    (found,) = json.loads(result.stdout)["measured"]
    (memory,) = found["memory"]
    assert memory["peak_rss"] >= memory["resident"] > 50e6
    assert memory["tokens"] == 124
    # at the least the gate and the up half of one MLP, in float32
    assert memory["activations"] > 2 * 124 * 48 * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "int8"), "no dtype 'int8': choose from bf16"),
        (("--variants", "eager,quick"), "no variant 'quick': choose from eager"),
        (("--variants", "flashnorm"), "lack eager"),
        (("--prefill", "many"), "--prefill takes token counts such as 1,64,512, not 'many'"),
        (("--tokens", "1"), "tokens 2 or more"),
        (("--context", "200"), "context and tokens are 232 together, and the model takes 124"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, monkeypatch, options, words):
    monkeypatch.setattr("flashnorm.cli.progress.SOON", 3600.0)  # no line of progress on a slow day
    result = run(config(tmp_path), *options, code=2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_that_writes_nothing_is_refused(tmp_path):
    file = config(tmp_path, model_type="bert", architectures=["BertModel"])
    assert "does not continue text" in run(file, code=2).stderr
