"""`flashnorm eval` without lm_eval: the shipped tasks, the options, the table, and what is said."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

from flashnorm.cli import app
from flashnorm.engines import evaluation_records as records
from flashnorm.engines import shipped_tasks as tasks
from flashnorm.engines.evaluation_records import (
    ACCELERATED,
    FOLDED,
    ORIGINAL,
    Failure,
    Note,
    Result,
    Score,
    Settings,
)

TEXT, QUESTIONS, PASSAGES = tasks.text(), tasks.questions(), tasks.passages()
MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "threads": 1,
    "kernels": "none",
    "torch": "1",
    "transformers": "2",
    "flashnorm": "3",
    "date": "2026-11-30",
    "lm_eval": "4",
    "datasets": "5",
}


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "140"})
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def test_every_true_continuation_follows_and_no_other_does():
    assert 60 <= len(QUESTIONS) <= 100
    for question in QUESTIONS:
        follows = [f"{question.context} {choice}" in TEXT for choice in question.choices]
        assert [at for at, true in enumerate(follows) if true] == [question.answer]


def test_the_choices_differ_in_their_words_and_not_in_their_number():
    for question in QUESTIONS:
        assert len(set(question.choices)) == tasks.CHOICES
        assert {len(choice.split()) for choice in question.choices} == {tasks.NEXT}
        assert all(choice in TEXT for choice in question.choices)


def test_answers_stand_everywhere_and_no_text_is_read_twice():
    counts = Counter(question.answer for question in QUESTIONS)
    assert set(counts) == set(range(tasks.CHOICES))
    assert max(counts.values()) - min(counts.values()) <= 1
    used = [f"{question.context} {question.choices[question.answer]}" for question in QUESTIONS]
    assert len(set(used)) == len(used)


def test_the_passages_are_the_text():
    assert "\n\n".join(PASSAGES) == TEXT.strip()
    assert all(len(passage) >= tasks.PASSAGE for passage in PASSAGES[:-1])


def test_each_task_file_names_a_function_that_is_there():
    files = sorted(tasks.folder().glob("*.yaml"))
    for file in files:
        content = file.read_text("utf-8")
        assert re.search(r"^task: (\w+)$", content, re.MULTILINE)[1] == file.stem
        place = re.search(r"^custom_dataset: !function (\S+)$", content, re.MULTILINE)[1]
        module, _, name = place.rpartition(".")
        assert module == tasks.__name__
        assert callable(getattr(tasks, name))
    help_text = re.sub(r"[\s│]+", "", run("--help").stdout)
    assert all(file.stem in help_text for file in files)
    assert len(files) == 2


@pytest.mark.parametrize("blocked", ["lm_eval", "lm_eval.models.huggingface"])
def test_without_lm_eval_there_is_one_line(monkeypatch, blocked, tmp_path):
    monkeypatch.setitem(sys.modules, blocked, None)
    if blocked != "lm_eval":
        pytest.importorskip("lm_eval")
    result = run("anything", code=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: evaluation needs lm_eval")
    assert line.endswith("pip install 'flashnorm[eval]'")
    said = json.loads(run("anything", "--json", code=2).stdout)
    assert said["error"] == line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variants", "orginal"], "--variants takes original, folded, accelerated, not orginal"),
        (["--variants", ","], "--variants takes original, folded, accelerated, not nothing"),
        (["--dtype", "int8"], "--dtype takes as stored, bf16, fp32, fp16, not int8"),
        (["--tasks", ","], "--tasks takes names"),
        (["--limit", "0"], "--limit takes a count of at least 1, not 0"),
        (["--batch-size", "-1"], "--batch-size takes a count of at least 1, not -1"),
        (["--include", "nowhere"], "--include nowhere is no directory of task files"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    assert words in run("anything", *options, code=2).stderr


def test_a_checkpoint_that_is_not_folded_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    said = run("anything", tmp_path, code=2).stderr
    assert f"{tmp_path} is no folded checkpoint: flashnorm fold writes one" in said


@pytest.fixture
def result(tmp_path):
    base = tmp_path / "private" / "model"
    base.mkdir(parents=True)
    found = Result(Settings(str(base), ("t",), dtypes=("fp32", "bf16")), MACHINE)
    for dtype, variant, value in (
        ("fp32", ORIGINAL, 12.3456789),
        ("fp32", FOLDED, 12.3456790),
        ("bf16", FOLDED, 13.5),
        ("bf16", ACCELERATED, 14.25),
    ):
        found.scores.append(Score(dtype, variant, "t", "word_perplexity", value, 7))
    found.notes.append(Note("fp32", FOLDED, "4 gains folded in memory"))
    found.failures.append(Failure("bf16", ORIGINAL, "t", "ValueError: no | memory"))
    return found


def test_differences_are_from_the_original(result):
    fp32, bf16 = records.rows(result)
    assert fp32.difference(FOLDED) == pytest.approx(1e-7, rel=1e-5)
    assert fp32.difference(ORIGINAL) is None
    assert bf16.difference(FOLDED) is None  # there is no original to differ from


def test_the_files_have_what_the_table_has(result, tmp_path):
    records.write(result, tmp_path / "out" / "figures")
    data = json.loads((tmp_path / "out" / "figures.json").read_text())
    text = (tmp_path / "out" / "figures.md").read_text()
    assert data == json.loads(json.dumps(result.to_json()))
    assert "| t | word_perplexity | 7 | 12.345679 | 12.345679 | +1e-07 | – | – |" in text
    assert "| t | word_perplexity | 7 | – | 13.5 | – | 14.25 | – |" in text
    assert "original failed in t: ValueError: no | memory" in text
    assert "folded: 4 gains folded in memory" in text
    assert "lm_eval 4, datasets 5" in text
    assert "private" not in text + json.dumps(data)
