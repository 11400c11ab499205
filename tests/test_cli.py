"""Every command as a shell sees it: streams, JSON, exit codes, one line for an error."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app
from flashnorm.plan import Plan

transformers = pytest.importorskip("transformers")
LAYERS, WIDTH = 2, 32


def llama(path: Path, seed: int = 0, tied: bool = False) -> Path:
    """A tiny Llama on disk with gains 1 + 0.3·N(0, 1)."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`a`, its fold `b`, and another model `c`."""
    folder = tmp_path_factory.mktemp("models")
    llama(folder / "a")
    llama(folder / "c", seed=1)
    flashnorm.fold_checkpoint(folder / "a", folder / "b")
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})
    shown = f"{result.stdout}\n{result.stderr}"
    assert result.exit_code == code, shown
    assert "Traceback" not in shown
    return result


def error_of(*arguments):
    """The error, which is the same line on stderr and in the JSON of stdout."""
    plain = run(*arguments, code=2)
    assert plain.stdout == ""
    assert plain.stderr.startswith("error: ")
    assert plain.stderr.count("\n") == 1
    in_json = run(*arguments, "--json", code=2)
    assert in_json.stderr == plain.stderr
    message = plain.stderr.removeprefix("error: ").rstrip("\n")
    assert json.loads(in_json.stdout) == {"error": message}
    return message


def shell(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "flashnorm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        **options,
    )


def test_inspect_shows_a_row_per_kind_of_norm_and_a_summary(models):
    shown = run("inspect", models / "a").stdout
    assert "model.layers.{0-1}.input_layernorm ×2" in shown
    assert "self_attn: q_proj k_proj v_proj" in shown
    assert "5 of 5 norms fold (100.0%)" in shown
    assert f"{5 * WIDTH} of {5 * WIDTH} gain elements become one" in shown


def test_inspect_all_shows_a_row_per_norm(models):
    shown = run("inspect", models / "a", "--all").stdout
    assert "model.layers.0.input_layernorm " in shown
    assert "model.layers.1.input_layernorm " in shown


def test_inspect_prints_the_plan_as_json_and_nothing_else(models):
    result = run("inspect", models / "a", "--json")
    data = json.loads(result.stdout)
    plan = flashnorm.inspect(models / "a")
    assert Plan.from_json(data) == plan
    assert next(iter(data)) == "sites"
    assert {s["path"]: s["gain_state"] for s in data["sites"]} == {
        s.path: s.gain_state for s in plan.sites
    }
    assert result.stderr == ""


def test_inspect_says_why_a_tied_head_is_kept_and_unties_it(tmp_path):
    path = llama(tmp_path / "tied", tied=True)
    assert "untie it (--untie) to fold" in " ".join(run("inspect", path).stdout.split())
    shown = run("inspect", path, "--untie").stdout
    assert "untied: lm_head.weight gets a copy of model.embed_tokens.weight of its own" in shown
    assert "5 of 5 norms fold" in shown


def config_file(path: Path, **config) -> Path:
    path.write_text(json.dumps(config))
    return path


def tiny(**changes):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return {"model_type": "llama", **shape, **heads, **changes}


def test_inspect_needs_no_more_than_a_config(tmp_path):
    data = json.loads(run("inspect", config_file(tmp_path / "c.json", **tiny()), "--json").stdout)
    assert [site["gain_state"] for site in data["sites"]] == ["folded"] * 5
    assert {site["width"] for site in data["sites"]} == {32}


def test_inspect_of_an_already_folded_model_says_so(models):
    shown = run("inspect", models / "b").stdout
    assert "0 of 5 norms fold" in shown
    assert "its gain is one everywhere already" in " ".join(shown.split())
    assert "note: folded before" in shown


def test_inspect_of_quantized_weights_keeps_every_norm(tmp_path, models):
    config = json.loads((models / "a" / "config.json").read_text())
    (tmp_path / "q").mkdir()
    config_file(tmp_path / "q" / "config.json", **config, quantization_config={"quant_method": "x"})
    data = json.loads(run("inspect", tmp_path / "q", "--json").stdout)
    assert {site["gain_state"] for site in data["sites"]} == {"kept"}
    assert "quantized (x)" in data["sites"][0]["reason"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing/at/all", "nothing/at/all does not exist: give a directory"),
        ("nothing.gguf", "nothing.gguf does not exist"),
        ("empty", "empty holds no config.json and no GGUF file"),
    ],
)
def test_a_missing_model_is_one_line(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for command in (["inspect", name], ["verify", name, name]):
        assert words in error_of(*command)
    assert name in error_of("fold", name, "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_unknown_model_type_is_one_line(tmp_path):
    file = config_file(tmp_path / "config.json", model_type="hyperloop")
    for place in (file, tmp_path):
        assert "does not know the model type 'hyperloop'" in error_of("inspect", place)


def test_a_broken_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in error_of("inspect", tmp_path)
    assert "is not valid JSON" in error_of("inspect", tmp_path / "config.json")


def test_fold_writes_what_the_function_writes(models, tmp_path):
    shown = run("fold", models / "a", tmp_path / "dst").stdout
    assert "5 of 5 norms fold" in shown
    proof = f"prove it: flashnorm verify {models / 'a'} {tmp_path / 'dst'}"
    assert proof in shown.splitlines(), "whole, to be copied, however long it is"
    for file in (models / "b").iterdir():
        assert (tmp_path / "dst" / file.name).read_bytes() == file.read_bytes()


def test_fold_json(models, tmp_path):
    result = run("fold", models / "a", tmp_path / "dst", "--strict", "--json")
    data = json.loads(result.stdout)
    assert (data["norms"], data["folded"], data["mode"]) == (5, 5, "strict")
    assert data["bytes"] == (tmp_path / "dst" / "model.safetensors").stat().st_size
    assert data["target"] == str(tmp_path / "dst")
    assert Plan.from_json(data["plan"]) == flashnorm.inspect(models / "a")


def test_fold_refuses_in_one_line(models, tmp_path):
    assert "was folded already" in error_of("fold", models / "b", tmp_path / "dst")
    assert "exists already" in error_of("fold", models / "a", models / "c")
    assert list(tmp_path.iterdir()) == []


def test_fold_passes_warnings_on(models, tmp_path, monkeypatch):
    import warnings

    whole = flashnorm.fold_checkpoint

    def warning(*arguments, **options):
        plan = whole(*arguments, **options)
        warnings.warn("some gains are odd", stacklevel=2)
        return plan

    monkeypatch.setattr(flashnorm, "fold_checkpoint", warning, raising=False)
    assert run("fold", models / "a", tmp_path / "x").stderr == "warning: some gains are odd\n"
    data = json.loads(run("fold", models / "a", tmp_path / "y", "--json").stdout)
    assert data["warnings"] == ["some gains are odd"]


def test_an_interrupted_fold_says_what_stays_and_goes_on(models, tmp_path, monkeypatch):
    whole = flashnorm.fold_checkpoint

    def interrupted(*arguments, **options):
        def stop(*_):
            raise KeyboardInterrupt

        return whole(*arguments, **{**options, "progress": stop})

    monkeypatch.setattr(flashnorm, "fold_checkpoint", interrupted, raising=False)
    result = run("fold", models / "a", tmp_path / "dst", code=130)
    assert "interrupted: " in result.stderr
    assert "run the same command to go on" in result.stderr
    assert not (tmp_path / "dst").exists()
    assert len(list(tmp_path.iterdir())) == 1, "the work that is done stays"
    monkeypatch.setattr(flashnorm, "fold_checkpoint", whole)
    run("fold", models / "a", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_verify_ends_with_0_for_equal_models(models):
    result = run("verify", models / "a", models / "b", "--json")
    data = json.loads(result.stdout)
    assert data["ok"] is True
    assert result.stderr == ""


def test_verify_ends_with_1_for_others(models):
    shown = run("verify", models / "a", models / "c", code=1).stdout
    assert "FAIL" in shown
    assert "does NOT compute" in shown


def test_verify_quick_compares_weights(models, tmp_path):
    result = run("verify", models / "a", models / "b", "--quick")
    assert "The candidate is, bit for bit, what the fold of it makes." in result.stdout
    found = json.loads(run("verify", models / "a", models / "b", "--quick", "--json").stdout)
    assert found["ok"] is True
    assert (found["mode"], found["wrong"], found["files"]) == ("compat", [], [])
    copied = tmp_path / "b"
    shutil.copytree(models / "b", copied)
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    shown = run("verify", models / "a", copied, "--quick", code=1).stdout
    assert "1 wrong" in shown
    assert "The candidate is NOT what the fold of it makes." in shown
    found = json.loads(run("verify", models / "a", copied, "--quick", "--json", code=1).stdout)
    assert (found["ok"], found["wrong"][0]["count"]) == (False, 1)
    assert found["wrong"][0]["tensor"] in " ".join(shown.split())


def test_verify_quick_says_what_it_cannot_compare(models, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    message = error_of("verify", tmp_path / "x.gguf", models / "b", "--quick")
    assert "is a GGUF file" in message
    (tmp_path / "text").write_text("words")
    message = error_of("verify", "a", "b", "--quick", "--text", tmp_path / "text")
    assert "--quick runs no model, so it reads no text" in message
    message = error_of("verify", "a", "b", "--inputs", tmp_path / "text")
    assert "--inputs is for --quick" in message


def test_verify_from_disk(models, monkeypatch):
    monkeypatch.setattr("flashnorm.checkpoint.disk_model.SMALL", 0)
    found = json.loads(run("verify", models / "a", models / "b", "--stream", "--json").stdout)
    assert (found["ok"], found["greedy"]) == (True, None)
    assert any("read from disk while they were used" in note for note in found["notes"])
    assert not json.loads(
        run("verify", models / "a", models / "c", "--stream", "--json", code=1).stdout
    )["ok"]
    monkeypatch.setattr("flashnorm.verification.streaming.available_memory", lambda: 1000)
    assert json.loads(run("verify", models / "a", models / "b", "--json").stdout)["greedy"] is None
    plain = run("verify", models / "a", models / "b", "--no-stream", "--json").stdout
    assert json.loads(plain)["greedy"] is not None


def test_verify_quick_takes_no_options_of_running(models, tmp_path):
    both = ("verify", models / "a", models / "b", "--quick")
    message = error_of(*both, "--no-stream")
    assert "--quick runs no model, and reads from disk: leave out --stream" in message
    message = error_of(*both, "--html", tmp_path / "page.html")
    assert "--quick runs none: use --json" in message
    assert not (tmp_path / "page.html").exists()


def test_verify_reads_a_text(models, tmp_path, monkeypatch):
    seen = {}

    class Proof:
        ok = True

        def to_json(self):
            return {"ok": True}

    def verify(reference, candidate, *, text, stream, progress):
        seen["text"] = text
        seen["logs"] = transformers.utils.logging.get_logger().isEnabledFor(logging.WARNING)
        print("a library that prints")
        return Proof()

    monkeypatch.setattr(flashnorm, "verify", verify, raising=False)
    (tmp_path / "text").write_text("naïve words", "utf-8")
    result = run("verify", "a", "b", "--text", tmp_path / "text", "--json")
    assert seen == {"text": "naïve words", "logs": False}
    assert json.loads(result.stdout) == {"ok": True}
    assert "a library that prints" in result.stderr


def test_verify_of_an_unreadable_text_is_one_line(models, tmp_path):
    (tmp_path / "latin").write_bytes(b"na\xefve")
    for name in ("latin", "missing"):
        message = error_of("verify", models / "a", models / "b", "--text", tmp_path / name)
        assert f"{name} cannot be read as UTF-8 text" in message


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_demo_runs_the_demo(ok, code, tmp_path, monkeypatch):
    import flashnorm.demo

    class Proof:
        def to_json(self):
            return {"ok": ok}

    Proof.ok = ok

    def run_demo(directory, *, console):
        console.print(f"in {Path(directory).name}")
        return Proof()

    monkeypatch.setattr(flashnorm.demo, "run_demo", run_demo)
    assert run("demo", "--directory", tmp_path / "d", code=code).stdout == "in d\n"
    result = run("demo", "--directory", tmp_path / "d", "--json", code=code)
    assert json.loads(result.stdout) == {"ok": ok}
    assert result.stderr == "in d\n"


def test_a_defect_is_not_mistaken_for_a_verdict(models, monkeypatch):
    def verify(*_, **__):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(flashnorm, "verify", verify, raising=False)
    message = error_of("verify", models / "a", models / "b")
    assert message.startswith("unexpected ZeroDivisionError: by zero (this is a defect of")


@pytest.mark.parametrize("how", ["--traceback", "FLASHNORM_DEBUG"])
def test_a_traceback_on_demand(how, tmp_path):
    flags = [how] if how.startswith("-") else []
    environment = {} if flags else {how: "1"}
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), *flags], env=environment)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "error: " in result.stderr.splitlines()[-1]
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["inspect"], ["fold", "a"], ["verify", "a"], ["inspect", "a", "--no"], ["melt"]]
)
def test_wrong_usage_ends_with_2(arguments):
    assert "Usage: flashnorm" in CliRunner().invoke(app, arguments, prog_name="flashnorm").stderr
    run(*arguments, code=2)


def test_version():
    assert run("--version").stdout == f"flashnorm {flashnorm.__version__}\n"
    assert shell("--version").stdout == f"flashnorm {flashnorm.__version__}\n"


@pytest.mark.parametrize("command", ["inspect", "fold", "verify", "demo"])
def test_help_of_every_command(command):
    shown = run(command, "--help").stdout
    assert "--json" in shown
    assert "--traceback" in shown


def test_a_real_process_prints_only_json(models):
    """Logging, progress bars and warnings of a fresh transformers included."""
    done = shell("inspect", models / "a", "--json")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)["sites"]) == 5
    assert done.stderr == ""


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_a_closed_pipe_is_quiet(flags):
    code = (
        "import flashnorm; flashnorm.inspect = lambda *_, **__: flashnorm.Plan(())\n"
        "from flashnorm.cli import main; main()"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "anything", *flags],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=180,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
