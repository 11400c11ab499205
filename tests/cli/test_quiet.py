"""`--quiet`: no progress and no warnings; the result, errors and JSON stay."""

from __future__ import annotations

import json
import warnings

import pytest
import typer
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app, boundary, progress
from flashnorm.plan import Plan

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_takes_it(name):
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"--quiet", "-q", "--traceback"} <= options
    assert "--json" in options or name == "run"


def noisy(*_, **__):
    """An inspection that takes long, as progress sees it, and warns."""
    with progress.named_steps("first") as steps:
        steps("second")
        with steps.paused():
            pass
    warnings.warn("some gains are odd", stacklevel=2)
    return Plan((), notes=("a note",))


@pytest.fixture
def inspecting(monkeypatch):
    monkeypatch.setattr(progress, "SOON", 0.0)
    monkeypatch.setattr(flashnorm, "inspect", noisy, raising=False)
    return lambda *flags: CliRunner().invoke(app, ["inspect", "anything", *flags])


def test_progress_and_warnings_go_and_the_result_stays(inspecting):
    loud, quiet = inspecting(), inspecting("--quiet")
    assert "warning: some gains are odd" in loud.stderr
    assert "second" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout != ""


def test_json_keeps_the_warnings(inspecting):
    result = inspecting("-q", "--json")
    assert result.stderr == ""
    assert json.loads(result.stdout)["warnings"] == ["some gains are odd"]


def test_errors_stay(monkeypatch):
    def failing(*_, **__):
        raise flashnorm.FlashNormError("no such thing")

    monkeypatch.setattr(flashnorm, "inspect", failing, raising=False)
    result = CliRunner().invoke(app, ["inspect", "anything", "-q"])
    assert (result.exit_code, result.stderr) == (2, "error: no such thing\n")


def test_it_holds_for_one_command(inspecting):
    inspecting("--quiet")
    assert not boundary.is_quiet()
    assert "second" in inspecting().stderr


def test_a_quiet_demo_prints_its_report_alone(monkeypatch, tmp_path):
    import flashnorm.demo

    class Proof:
        ok = True

        def to_json(self):
            return {"ok": True}

        def __str__(self):
            return "the report"

    def run_demo(directory, *, console):
        console.print("step 1")
        return Proof()

    monkeypatch.setattr(flashnorm.demo, "run_demo", run_demo)
    result = CliRunner().invoke(app, ["demo", "--directory", str(tmp_path), "-q"])
    assert (result.stderr, result.stdout.strip()) == ("", "the report")


def test_a_quiet_run_says_nothing_of_its_own():
    loud, quiet = (CliRunner().invoke(app, ["run", *flags, "--", "true"]) for flags in ([], ["-q"]))
    assert "no model was loaded" in loud.stderr
    assert (quiet.exit_code, quiet.stderr, quiet.stdout) == (0, "", "")
