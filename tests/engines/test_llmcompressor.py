"""llm-compressor's SmoothQuant on folded checkpoints it has no mappings for: the plan has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PhiConfig

pytest.importorskip("llmcompressor", reason="the recipe goes through it")

from tests.errors import rounding
from tests.zoo import randomize_

from .models import SMALL, tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("config", [GPTNeoXConfig, PhiConfig])
def test_the_page(config, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_config(config(**SMALL)).eval()
    randomize_(model, 0)
    model.save_pretrained(tmp_path / "my-model")
    tokenizer().save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for text in (BLOCKS[0], next(text for text in BLOCKS if "llmcompressor" in text)):
        exec(compile(text, "recipes.md", "exec"), names)
    with torch.no_grad():
        found = names["compressed"].eval().float()(names["ids"]).logits
    error = (found - names["truth"]).abs().max() / names["truth"].abs().max()
    assert error < rounding(SMALL["intermediate_size"], 20, torch.float32)
    before = dict(names["folded"].named_parameters())
    for consumer in (consumer for site in names["plan"].folded for consumer in site.consumers):
        after = names["compressed"].get_parameter(consumer.parameter)
        assert not torch.allclose(after.double(), before[consumer.parameter], rtol=0.05)
