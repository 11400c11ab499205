"""`flashnorm bench` as a shell sees it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import flashnorm
from flashnorm.bench.engines.children import KINDS, Kind
from flashnorm.bench.further import further
from flashnorm.bench.records import EAGER, FORWARD, GENERATE, OURS, PREFILL, Settings
from flashnorm.bench.run import bench
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
        config(tmp_path),
        *SMALL,
        *CACHE,
        "--variants",
        "eager",
        "--dtype",
        "fp32",
        "--memory",
        "--json",
    )
    (found,) = json.loads(result.stdout)["measured"]
    (memory,) = found["memory"]
    assert memory["peak_rss"] >= memory["resident"] > 50e6
    assert memory["tokens"] == 124
    # at the least the gate and the up half of one MLP, in float32
    assert memory["activations"] > 2 * 124 * 48 * 4


@pytest.mark.usefixtures("ours")
def test_decoding_after_several_contexts(tmp_path, monkeypatch):
    for place in ("variants", "measure"):
        monkeypatch.setattr(f"flashnorm.bench.{place}.LONG", 16)
    small = ("--rounds", "1", "--tokens", "4", "--context", "40,8", "--prefill", "4")
    result = run(config(tmp_path), *small, *CACHE, "--dtype", "fp32", "--json")
    (found,) = json.loads(result.stdout)["measured"]
    rows = {(row["kind"], row["context"], row["variant"]) for row in found["rows"]}
    decoded = {(GENERATE, 8), (FORWARD, 8), (FORWARD, 40)}  # a long prompt is not read every time
    assert rows == {
        (*place, name) for place in (*decoded, (PREFILL, None)) for name in (EAGER, OURS)
    }
    assert not found["failures"]


FAKE = """
class Engine:
    def about(self):
        return {"engine": "fake 1.0", "note": "a note"}
    def decode(self, prompt, tokens):
        return 0.5, [63] * tokens
    def prefill(self, ids):
        if len(ids) == 16:
            raise ValueError("no more than 15")
        return 0.25

def make(asked):
    assert asked["room"] >= 16 and asked["threads"] == 1 and asked["dtype"] == "fp32"
    return Engine()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An engine that every Python has."""
    (tmp_path / "fake.py").write_text(FAKE)
    kind = Kind(str(tmp_path / "fake"), "json", "pip install fake")
    monkeypatch.setitem(KINDS, "fake", kind)
    (tmp_path / "fake-fp32.gguf").write_text("")
    return ("--engines", "fake", "--gguf", tmp_path / "fake-{dtype}.gguf", "--threads", "1")


@pytest.mark.usefixtures("ours")
def test_another_engine_is_timed_beside_ours(tmp_path, fake):
    result = run(config(tmp_path), *SMALL, *CACHE, *fake, "--dtype", "fp32", "--json")
    (found,) = json.loads(result.stdout)["measured"]
    (engine,) = found["engines"]
    assert (engine["engine"], engine["note"], engine["tokens"]) == ("fake 1.0", "a note", 4)
    assert engine["equal"] < 4
    assert engine["margin"] > 0
    assert engine["file"].endswith("fake-fp32.gguf")
    rows = {(row["kind"], row["tokens"]): row for row in found["rows"] if row["variant"] == "fake"}
    assert set(rows) == {(GENERATE, 1), (PREFILL, 1)}
    assert rows[GENERATE, 1]["milliseconds"]["median"] == 500
    assert rows[GENERATE, 1]["gigabytes"] is None
    assert {(fail["variant"], fail["step"]) for fail in found["failures"]} == {
        (EAGER, "prefill of 4096"),
        ("fake", "prefill of 16"),
    }
    assert {(row["kind"], row["tokens"]) for row in found["rows"] if row["variant"] == OURS} == {
        (GENERATE, 1),
        (FORWARD, 1),
        (PREFILL, 1),
        (PREFILL, 16),
    }


@pytest.mark.usefixtures("ours")
def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flashnorm.bench.run.prefill", interrupted)
    file = config(tmp_path / "tiny")
    shown = run(file, *SMALL, *CACHE, code=130)
    assert "decode, generate(), after 8 tokens" in shown.stdout
    assert "what was measured until now is kept" in shown.stderr
    result = run(file, *SMALL, *CACHE, "--json", "--out", tmp_path / "out", code=130)
    data = json.loads(result.stdout)
    assert data["complete"] is False
    assert {row["kind"] for row in data["measured"][0]["rows"]} == {GENERATE, FORWARD}
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["measured"] == data["measured"]
    assert "after 8 tokens" in (tmp_path / "out.md").read_text()


@pytest.mark.usefixtures("ours")
def test_every_group_is_given_as_soon_as_it_is_there(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        "flashnorm.bench.run._Bench.progress", lambda self, step: steps.append(step)
    )
    monkeypatch.setattr("flashnorm.bench.run._Bench.within", lambda self, step: None)
    settings = Settings(
        str(config(tmp_path)), rounds=1, tokens=4, contexts=(8,), prefill=(1, 2), cache=10**6
    )
    found = bench(settings, done=lambda result, table: steps.append((table.title, result.complete)))
    assert found.complete
    assert steps[steps.index("decoding after 8") - 1] == ("correctness", False)
    assert steps[-5:] == [
        ("decode, forward loop, after 8 tokens", False),
        "prefill of 1",
        ("prefill of 1", False),
        "prefill of 2",
        ("prefill of 2", False),
    ]


@pytest.mark.usefixtures("ours")
def test_what_a_longer_run_adds_is_said_at_the_end(tmp_path):
    shown = run(config(tmp_path), *SMALL, *CACHE).stdout
    for option in ("--rounds 7", "--context 64", "--memory", "--engines llama.cpp,openvino"):
        assert f"  {option}" in shown
    assert "--memory" not in further(Settings("x", memory=True))
    assert "--engines openvino:" in further(Settings("x", engines=("llama.cpp=python",)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "int8"), "no dtype 'int8': choose from bf16"),
        (("--variants", "eager,quick"), "no variant 'quick': choose from eager"),
        (("--variants", "flashnorm"), "lack eager"),
        (("--engines", "vllm"), "no engine 'vllm': choose from llama.cpp, openvino"),
        (("--engines", "llama.cpp=/no/python"), "llama.cpp: /no/python does not run"),
        (("--engines", "json"), "json reads GGUF files, and"),
        (("--engines", "json", "--gguf", "no.gguf"), "no.gguf: see --gguf"),
        (("--engines", "none"), "has no no_such_module: pip install none, or name the Python"),
        (("--context", "long"), "--context takes token counts such as 1,64,512, not 'long'"),
        (("--prefill", "many"), "--prefill takes token counts such as 1,64,512, not 'many'"),
        (("--tokens", "1"), "tokens 2 or more"),
        (("--context", "200"), "context and tokens are 232 together, and the model takes 124"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, monkeypatch, options, words):
    monkeypatch.setitem(KINDS, "json", Kind("run_json", "json", "pip install json"))
    monkeypatch.setitem(KINDS, "none", Kind("run_none", "no_such_module", "pip install none"))
    monkeypatch.setattr("flashnorm.cli.progress.SOON", 3600.0)  # no line of progress on a slow day
    result = run(config(tmp_path), *options, code=2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_that_writes_nothing_is_refused(tmp_path):
    file = config(tmp_path, model_type="bert", architectures=["BertModel"])
    assert "does not continue text" in run(file, code=2).stderr
