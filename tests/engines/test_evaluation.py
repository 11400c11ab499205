"""`flashnorm eval` with lm_eval itself: tiny models, random gains, and the shipped tasks."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import flashnorm
from flashnorm.bench.models import DTYPES
from flashnorm.cli import app
from flashnorm.engines import shipped_tasks
from tests.engines.models import FAMILIES
from tests.errors import rounding

pytest.importorskip("lm_eval", reason="the tasks are run by it")

TASKS = {"founding_perplexity", "founding_continuation"}
OTHER = """\
task: other
dataset_path: nobody/of-this-name
test_split: test
output_type: multiple_choice
doc_to_text: a
doc_to_choice: b
doc_to_target: c
"""


@pytest.fixture(autouse=True)
def _no_list_of_packages(monkeypatch):
    """lm_eval asks pip for one at every task, which takes seconds and is not shown."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None, raising=False)


def tokenizer():
    """A token for each word and sign of the shipped text."""
    split = pre_tokenizers.Whitespace()
    found = sorted({word for word, _ in split.pre_tokenize_str(shipped_tasks.text())})
    words = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", *found])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write(family, path):
    """A model that reads those words, with gains and biases of no round value."""
    cls, config = FAMILIES[family]
    words, config = tokenizer(), copy.deepcopy(config)
    config.vocab_size = len(words)
    torch.manual_seed(3)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)  # logits far from uniform
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def figures(result):
    return {(row["task"], row["metric"]): row for row in json.loads(result.stdout)["rows"]}


def most_moved(path):
    """How far rounding alone moves log p of a token: twice as far as the largest logit."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer()(shipped_tasks.passages()[0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    config = model.config
    width = max(config.hidden_size, config.intermediate_size, len(ids[0]))
    depth = 7 * config.num_hidden_layers + 1
    return 2 * rounding(width, depth, torch.float32) * float(logits.abs().max())


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt-neox"])
def family(request, tmp_path_factory):
    """A model and its folded checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    write(request.param, folder / "base")
    flashnorm.fold_checkpoint(folder / "base", folder / "folded")
    return folder


def distance(row, variant):
    """|Δ log perplexity| per token."""
    return abs(math.log(row["values"][variant]) - math.log(row["values"]["original"]))


def test_folded_and_accelerated_are_the_original(family, tmp_path):
    """Of a folded checkpoint and of a fold in memory; JSON, files and table say the same."""
    options = ("--dtype", "fp32", "--limit", 2, "--json", "--out", tmp_path / "out")
    allowed = most_moved(family / "base")
    for checkpoint in ([family / "folded"], []):
        result = run(family / "base", *checkpoint, *options)
        found = figures(result)
        assert {task for task, _ in found} == TASKS
        tokens = found["founding_perplexity", "token_perplexity"]
        assert tokens["count"] == 2
        assert 1 < tokens["values"]["original"] < math.inf
        for variant in ("folded", "accelerated"):
            assert distance(tokens, variant) < allowed
            chosen = found["founding_continuation", "acc"]
            assert chosen["values"][variant] == chosen["values"]["original"]
        data = json.loads(result.stdout)
        assert data["rows"] == json.loads((tmp_path / "out.json").read_text())["rows"]
        text = (tmp_path / "out.md").read_text()
        for row in data["rows"]:
            assert all(f"| {value:.8g} |" in text for value in row["values"].values())
        assert all(data["machine"][name] for name in ("lm_eval", "transformers", "torch"))
    assert "gains folded in memory" in text
    assert "modules run on" in text


def test_one_wrong_gain_is_seen(family, tmp_path):
    """The last gain of the folded checkpoint, a vector of ones by now, is a tenth larger."""
    import shutil

    from safetensors.torch import load_file, save_file

    wrong = shutil.copytree(family / "folded", tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    name = [key for key in tensors if "norm" in key and key.endswith("weight")][-1]
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    found = figures(
        run(family / "base", wrong, "--variants", "original,folded", "--dtype", "fp32", "--limit",
            2, "--json")
    )  # fmt: skip
    tokens = found["founding_perplexity", "token_perplexity"]
    assert distance(tokens, "folded") > most_moved(family / "base")
    logs = found["founding_continuation", "loglikelihood"]
    assert logs["differences"]["folded"] != 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("model") / "base")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_token_perplexity_is_what_the_model_says(llama, dtype):
    """By hand: a passage behind the token that begins a text, no harness in between.

    The logits are the same bits in bf16 too, so that only log p is rounded, to float32.
    """
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=DTYPES[dtype])
    words, total, count = tokenizer(), 0.0, 0
    for passage in shipped_tasks.passages()[:2]:
        ids = torch.tensor([[words.bos_token_id, *words(passage).input_ids]])
        assert ids.shape[1] <= model.config.max_position_embeddings
        with torch.no_grad():
            logs = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        total += float(logs.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    found = figures(run(llama, "--variants", "original", "--dtype", dtype, "--limit", 2, "--json"))
    row = found["founding_perplexity", "token_perplexity"]
    assert abs(math.log(row["values"]["original"]) + total / count) < most_moved(llama)


def test_what_fails_is_a_row_and_the_rest_goes_on(llama, monkeypatch, tmp_path):
    def broken(model):
        raise ValueError("no kernels\nfor this")

    monkeypatch.setattr(flashnorm, "accelerate_", broken, raising=False)
    options = ("--tasks", "founding_continuation", "--limit", 1, "--out", tmp_path / "out")
    result = run(llama, "--variants", "accelerated,original", *options, code=2)
    assert "accelerated failed : ValueError: no kernels for this" not in result.stdout
    assert "accelerated failed: ValueError: no kernels for this" in result.stdout
    (failure,) = json.loads((tmp_path / "out.json").read_text())["failures"]
    assert failure["variant"] == "accelerated"
    assert "loglikelihood" in (tmp_path / "out.md").read_text()


def test_what_was_found_is_written_before_the_next_begins(llama, monkeypatch, tmp_path):
    def stopped(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(flashnorm, "fold_", stopped, raising=False)
    options = ("--tasks", "founding_continuation", "--limit", 1, "--out", tmp_path / "out")
    result = run(llama, *options, code=130)
    assert "what was found until now is kept" in result.stderr
    (row, *_) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert list(row["values"]) == ["original"]


def test_as_stored_says_in_what(llama, tmp_path):
    """A folded checkpoint in another dtype than its base: the difference has two reasons."""
    flashnorm.fold_checkpoint(llama, tmp_path / "folded")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    options = ("--tasks", "founding_continuation", "--limit", 1, "--variants", "original,folded")
    notes = json.loads(run(llama, tmp_path / "half", *options, "--json").stdout)["notes"]
    assert [note["words"].rpartition(", in ")[2] for note in notes] == ["float32", "bfloat16"]


def test_a_model_that_was_folded_already_is_no_fold_in_memory(llama, tmp_path):
    folded = tmp_path / "folded"
    flashnorm.fold_checkpoint(llama, folded)
    options = ("--tasks", "founding_continuation", "--limit", 1, "--variants", "folded", "--json")
    (failure,) = json.loads(run(folded, *options, code=2).stdout)["failures"]
    assert re.search("no gain of .* folds", failure["error"])


def test_an_older_harness_is_refused(llama, monkeypatch):
    monkeypatch.delattr("lm_eval.tasks.TaskManager.load")
    said = run(llama, code=2).stderr
    assert re.search(r"lm_eval \d\S+ is too old, 0.4.12 is needed: pip install", said)


def test_a_task_that_nobody_knows_is_named(llama):
    said = run(llama, "--tasks", "founding_perplexty", code=2).stderr
    assert "lm_eval has no task founding_perplexty (near it are founding_perplexity" in said


def test_a_task_that_needs_the_network_is_named(llama, tmp_path):
    """In a process of its own: the hub is switched off as it is imported."""
    (tmp_path / "other.yaml").write_text(OTHER)
    words = ["eval", str(llama), "--tasks", "other", "--include", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "-m", "flashnorm", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "the task other cannot be loaded: its documents are on the network" in done.stderr
