"""`flashnorm run`: a program's models are accelerated, and the program is as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app
from flashnorm.engines import running
from flashnorm.engines.run import SETTINGS, STARTUP, Ran, Settings, run_command
from flashnorm.errors import FlashNormError
from tests.engines.models import write

ROOT = Path(flashnorm.__file__).parents[1]
PROMPT = torch.tensor([[5, 9, 33]])
# What a program may look at, before and after it loads a model; a child of it loads another.
PROGRAM = """
    import inspect, subprocess, sys
    import torch, transformers.modeling_utils as m
    from transformers import AutoModelForCausalLM
    assert type(m.__loader__).__name__ == type(m.__spec__.loader).__name__ == "SourceFileLoader"
    assert "class PreTrainedModel" in inspect.getsource(m)
    assert m.PreTrainedModel.from_pretrained.__doc__
    assert inspect.ismethod(m.PreTrainedModel.from_pretrained)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    tokens = model.generate(torch.tensor([[5, 9, 33]]), max_new_tokens=8, do_sample=False)
    print(tokens.tolist(), flush=True)
    if len(sys.argv) == 2:
        subprocess.run([sys.executable, "-m", "program", *sys.argv[1:], "child"], check=True)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("run") / "llama")


@pytest.fixture(scope="module")
def tokens(llama):
    """What a model says that is not accelerated."""
    model = LlamaForCausalLM.from_pretrained(llama)
    return model.generate(PROMPT, max_new_tokens=8, do_sample=False).tolist()


@pytest.fixture
def script(tmp_path):
    def make(text, name="program.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return make


def shell(*command, env=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "flashnorm", "run", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        **options,
    )


def words(*lines):
    return "".join(f"flashnorm: {line}\n" for line in lines)


NOTHING = words("no model was loaded by from_pretrained of transformers")


def test_a_program_and_its_child_run_on_kernels_and_say_the_same(llama, script, tokens, tmp_path):
    file = script(PROGRAM)
    file.write_text(f"#!{sys.executable}\n{file.read_text()}")
    file.chmod(0o755)
    given = ("--report", tmp_path / "r.json", "--html", tmp_path / "r.html")
    done = shell(*given, "--", file, llama, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tokens}\n" * 2), done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["command"] == [str(file), str(llama)]
    assert report["code"] == 0
    for model in report["models"]:
        assert model["model"] == "LlamaForCausalLM"
        assert model["source"] == str(llama)
        assert model["fused"] == model["modules"] == 22
    line = f"LlamaForCausalLM ({llama}): 22 of 22 modules on {report['models'][0]['kernels']}"
    assert len(report["models"]) == 2
    page = (tmp_path / "r.html").read_text("utf-8")
    written = f"written: {tmp_path / 'r.html'}, {len(page.encode()) / 1e3:,.0f} kB\n"
    assert done.stderr.endswith(words(line, line) + written)
    assert "acceleration" not in report["models"][0]
    assert "2 of 2 models were accelerated" in page
    assert page.count("22 of 22 modules run on kernels") == 2
    assert page.count("<td>gated</td>") == 4


def test_a_python_without_flashnorm_runs_all_the_same(llama, script, tokens, tmp_path):
    broken = tmp_path / "elsewhere" / "flashnorm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('none here')")
    here = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from flashnorm.cli import app; app()"
    )
    file = script(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-c", here, "run", "--", sys.executable, file, llama, "alone"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "PYTHONPATH": str(broken.parent)},
    )
    assert (done.returncode, done.stdout) == (0, f"{tokens}\n"), done.stderr
    said = f"flashnorm cannot be imported by {sys.executable}: none here"
    assert done.stderr.endswith(words(said) + NOTHING)


# What happens in the program, without one.


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A class whose models are taken as in a program, and what was noted of them."""

    def begin(**options):
        monkeypatch.setenv(SETTINGS, json.dumps({"notes": str(tmp_path), **options}))
        monkeypatch.setattr(running, "_program", None)
        monkeypatch.setattr("atexit.register", lambda function: None)
        monkeypatch.setattr("os.register_at_fork", lambda **functions: None)

        class Loaded(LlamaForCausalLM):
            pass

        running.seen(SimpleNamespace(PreTrainedModel=Loaded))

        def noted():
            return json.loads((tmp_path / f"{os.getpid()}.json").read_text())["models"]

        return Loaded, noted

    return begin


def test_folded_first(llama, program, tokens):
    loaded, noted = program(fold=True)
    model = loaded.from_pretrained(llama)
    assert flashnorm.folding(model).folded
    assert flashnorm.acceleration(model).fused
    assert noted()[0]["folded"]
    assert model.generate(PROMPT, max_new_tokens=8, do_sample=False).tolist() == tokens


def test_a_fold_is_said_though_no_kernel_runs(llama, program, monkeypatch):
    def refuse(model, **options):
        raise ValueError("no kernel")

    monkeypatch.setattr("flashnorm.runtime.accelerate_", refuse)
    loaded, noted = program(fold=True)
    assert flashnorm.folding(loaded.from_pretrained(llama)).folded
    assert noted()[0]["problem"] == "ValueError: no kernel (its gains are folded)"


def test_what_comes_with_a_model_is_handed_on(llama, program):
    loaded, noted = program()
    model, info = loaded.from_pretrained(llama, output_loading_info=True)
    assert "missing_keys" in info
    assert flashnorm.acceleration(model).fused
    assert not noted()[0]["folded"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("two\nlines"), "ValueError: two lines"), (FlashNormError("no"), "no")],
)
def test_a_model_that_cannot_be_accelerated_runs_as_it_is(
    llama, program, tokens, monkeypatch, error, said
):
    def failing(model, **_):
        raise error

    monkeypatch.setattr("flashnorm.runtime.accelerate_", failing)
    loaded, noted = program()
    model = loaded.from_pretrained(llama)
    assert model.generate(PROMPT, max_new_tokens=8, do_sample=False).tolist() == tokens
    assert noted() == [{"model": "Loaded", "source": str(llama), "problem": said}]
    ran = Ran(("x",), 0, tuple(noted()), {})
    assert f"{ran}\n" == words(f"Loaded ({llama}) was not accelerated: {said}")


def test_notes_that_cannot_be_written_stop_nothing(llama, program, tmp_path):
    loaded, _ = program(package=str(tmp_path / "file" / "is-none"))
    (tmp_path / "file").write_text("")
    assert loaded.from_pretrained(llama) is not None
    loaded, _ = program(notes=str(tmp_path / "gone"))
    assert flashnorm.acceleration(loaded.from_pretrained(llama)).fused


def test_a_program_that_accelerates_by_itself_may(llama, program):
    loaded, noted = program()
    wanted = flashnorm.FlashNormConfig(strict=True)
    model = loaded.from_pretrained(llama, quantization_config=wanted)
    assert noted()[0]["fused"] == len(flashnorm.acceleration(model).fused) == 22


def test_a_forked_child_does_not_repeat_its_parents_models(llama, program):
    loaded, _ = program()
    loaded.from_pretrained(llama)
    running.program().forked()
    assert running.program().models == []


@pytest.mark.parametrize("fold", [False, True])
def test_an_adapter_of_the_original_is_refused_where_the_base_is_folded(
    llama, program, monkeypatch, fold
):
    peft = pytest.importorskip("peft", reason="the adapter is its")
    from peft.tuners.tuners_utils import BaseTuner

    monkeypatch.setattr(BaseTuner, "__init__", BaseTuner.__init__)  # given back at the end
    loaded, _ = program(fold=fold)
    running.seen(SimpleNamespace(BaseTuner=BaseTuner))
    model = loaded.from_pretrained(llama)
    lora = peft.LoraConfig(target_modules=["q_proj"])
    if not fold:
        assert peft.get_peft_model(model, lora)
        return
    with pytest.raises(FlashNormError, match="run without --fold"):
        peft.get_peft_model(model, lora)
    with pytest.raises(FlashNormError, match="run without --fold"):
        model.add_adapter(lora)


# The command.


def test_nothing_is_imported_that_the_program_does_not_import():
    code = (
        "import sys; print([m for m in ('torch', 'transformers', 'flashnorm') if m in sys.modules])"
    )
    done = shell("--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", NOTHING)


def test_a_sitecustomize_of_the_users_own_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.users_own = __file__")
    code = "import sys; print(sys.users_own, sys.modules['sitecustomize'].__file__)"
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = shell("--", sys.executable, "-c", code, env={"PYTHONPATH": paths})
    own = str(tmp_path / "sitecustomize.py")
    assert done.stdout == f"{own} {own}\n"


@pytest.mark.parametrize("command", ["exit 7", "exit 0", "kill -9 $$"])
def test_the_exit_code_is_the_commands(command, tmp_path):
    done = shell("--report", tmp_path / "r.json", "sh", "-c", command)
    code = 137 if "kill" in command else int(command[-1])
    assert (done.returncode, done.stdout, done.stderr) == (code, "", NOTHING)
    assert json.loads((tmp_path / "r.json").read_text())["code"] == code


def test_streams_are_the_commands():
    done = shell("cat", input="as it is\n")
    assert (done.stdout, done.stderr) == ("as it is\n", NOTHING)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_command(number, script, tmp_path):
    file = script(
        f"""
        import signal, sys, time
        got = []
        signal.signal({int(number)}, lambda n, frame: got.append(n))
        open({str(tmp_path / "up")!r}, "w").close()
        while not got:
            time.sleep(0.01)
        time.sleep(0.2)  # a second one would be counted
        print(got)
        sys.exit(5)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "flashnorm", "run", "--", sys.executable, file],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background ignores it
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (5, f"[{int(number)}]\n", NOTHING)


def test_what_cannot_be_started_is_one_line(script):
    file = script("print(1)")
    for command, said in (
        (["no-such-command"], "the command 'no-such-command' was not found: check its spelling"),
        ([file], f"{file} cannot be executed: for a script, run `python {file}`"),
        (["--report", "/no/where.json", "true"], "FileNotFoundError"),
    ):
        done = shell(*command)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {said}")
        assert done.stderr.count("\n") == 1


def test_a_command_is_needed():
    assert CliRunner().invoke(app, ["run"]).exit_code == 2


def test_settings_go_through_the_environment_and_back(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    start = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from flashnorm.engines.run import SETTINGS, Settings
told = Settings.read(os.environ[SETTINGS])
assert told.fold and told.package == os.path.abspath("here") and os.path.isdir(told.notes)
assert os.environ["PYTHONPATH"].split(os.pathsep) == [{str(STARTUP)!r}, "before"]
"""
    ran = run_command([sys.executable, "-c", start], fold=True, package="here")
    assert ran.code == 0
    assert os.environ["PYTHONPATH"] == "before"


def test_the_summary_says_what_fell_back():
    model = {
        "model": "M",
        "source": "",
        "problem": "",
        "modules": 3,
        "fused": 2,
        "kernels": "k",
        "folded": False,
        "attention": "it is odd",
        "reasons": {"too small": 1},
    }
    ran = Ran(("x",), 0, (model,), {"once": 1, "often": 9})
    assert str(ran) + "\n" == words(
        "M: 2 of 3 modules on k",
        "  1 ran their own code: too small",
        "  attention ran its own code: it is odd",
        "9 calls ran on plain torch: often",
        "1 calls ran on plain torch: once",
    )


def test_a_command_that_does_not_exist_is_an_error_in_python():
    with pytest.raises(FlashNormError, match="was not found"):
        run_command(["no-such-command"])
    assert Settings.read('{"notes": "n"}') == Settings("n")
