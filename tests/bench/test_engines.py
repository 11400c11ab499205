"""The comparison of engines: one question at a time, and failures that stop nobody else."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks.engines.compare import agreement, table
from flashnorm.bench.engines.children import Child, our_command

from .tiny import config

FAKE = """
import sys
from flashnorm.bench.engines.serve import serve

class Fake:
    def about(self):
        print("noise on stdout")
        return {"engine": "fake", "note": ""}
    def decode(self, prompt, tokens):
        return 0.5, prompt[:tokens]
    def prefill(self, ids):
        if len(ids) > 2:
            raise ValueError("too long")
        if len(ids) == 2:
            sys.exit("out of memory")
        return 0.25

serve(Fake())
"""


@pytest.fixture
def child(tmp_path):
    started = Child("fake", [sys.executable, "-c", FAKE], tmp_path / "log")
    yield started
    started.close()


def test_an_engine_answers_one_question_at_a_time(child):
    assert child.ask("about") == {"engine": "fake", "note": ""}
    assert child.ask("decode", prompt=[4, 5, 6], tokens=2) == {"seconds": 0.5, "tokens": [4, 5]}
    assert child.ask("prefill", ids=[1]) == {"seconds": 0.25}


@pytest.mark.filterwarnings("error")
def test_nothing_is_left_open(tmp_path):
    child = Child("fake", [sys.executable, "-c", FAKE], tmp_path / "log")
    child.ask("about")
    child.close()
    assert child.process.returncode == 0
    assert child.process.stdin.closed
    assert child.process.stdout.closed


def test_an_error_is_told_and_the_engine_goes_on(child):
    with pytest.raises(RuntimeError, match="fake: ValueError: too long"):
        child.ask("prefill", ids=[1, 2, 3])
    assert child.ask("prefill", ids=[1]) == {"seconds": 0.25}


def test_an_engine_that_dies_leaves_its_last_words(child):
    with pytest.raises(RuntimeError, match="fake ended: out of memory"):
        child.ask("prefill", ids=[1, 2])


def test_a_variant_of_ours_answers_as_the_others_do(tmp_path):
    file = str(config(tmp_path))
    child = Child("eager", our_command("eager", file, "fp32", 1), tmp_path / "log")
    try:
        assert "flashnorm" in child.ask("about")["engine"]
        found = child.ask("decode", prompt=[1, 2, 3], tokens=4)
        assert len(found["tokens"]) == 4
        assert found["seconds"] > 0
        assert child.ask("prefill", ids=[1, 2, 3])["seconds"] > 0
        margins = child.ask("margins", prompt=[1, 2, 3], tokens=found["tokens"])["margins"]
        assert all(margin > 0 for margin in margins)
    finally:
        child.close()


def test_agreement_counts_from_the_beginning_and_tells_the_margin():
    texts = {"eager": [1, 2, 3], "same": [1, 2, 3], "other": [1, 9, 3]}
    assert agreement(texts, [0.5, 0.125, 0.5]) == {
        "eager": "3 of 3",
        "same": "3 of 3",
        "other": "1 of 3, margin 0.125",
    }


def test_the_table_has_a_row_for_an_engine_that_failed():
    took = {"eager": {"median": 2.0, "lowest": 1.0, "highest": 3.0}}
    about = {"engine": "x", "note": "y"}
    found = {
        "engines": {"eager": about, "other": about},
        "decode": took,
        "prefill": {16: took},
        "equal_tokens": {"eager": "3 of 3"},
        "errors": {"other": "gone"},
    }
    lines = table(found)
    assert "| eager | 2.00 (1.00-3.00) | 2.00 (1.00-3.00) | 3 of 3 |" in lines
    assert "| other | – | – | – |" in lines
    assert "- other failed: gone" in lines


def test_rows_of_queries_are_reordered_as_llama_cpp_turns_them():
    make_models = pytest.importorskip("benchmarks.make_models")

    class Config:
        head_dim = 4

    rows = np.arange(8.0)[:, None]  # two heads of four rows
    found = make_models._reordered("x.q_proj.weight", rows, Config)
    assert found[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert make_models._reordered("x.v_proj.weight", rows, Config) is rows
