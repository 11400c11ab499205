"""`flashnorm run -- transformers serve`: the texts of a server without it, on kernels."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engines.models import write
from tests.engines.serving import BATCHES, complete, server, stream

for _package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(_package)

PROMPTS = ["w5 w6 w7", "w9 w10 w11 w12 w13 w14"]
TOKENS = 10


def answers(address, model):
    """Each prompt alone, streamed, and both at once."""
    alone = [complete(address, model, prompt, TOKENS) for prompt in PROMPTS]
    pieces = [stream(address, model, prompt, TOKENS) for prompt in PROMPTS]
    assert all(len(found) > 1 for found in pieces)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda p: complete(address, model, p, TOKENS), PROMPTS))
    return alone, ["".join(found) for found in pieces], together


@pytest.mark.parametrize("options", [(), BATCHES], ids=["one by one", "in batches"])
def test_a_server_says_what_it_said(tmp_path, options):
    model = write("llama", tmp_path / "llama")
    with server(model, *options) as address:
        expected = answers(address, model)
    assert [tokens for _, tokens in expected[0]] == [TOKENS] * len(PROMPTS)
    assert expected[0] == expected[2]
    assert [text for text, _ in expected[0]] == expected[1]
    assert len(set(expected[1])) == len(PROMPTS)
    report = tmp_path / "report.json"
    run = (sys.executable, "-m", "flashnorm", "run", "--report", str(report), "--")
    with server(model, *options, under=run) as address:
        assert answers(address, model) == expected
    found = json.loads(report.read_text())
    assert [note["fused"] for note in found["models"]] == [22]
    assert not found["problems"]
