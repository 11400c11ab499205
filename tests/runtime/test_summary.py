"""What `print(acceleration(model))` says: as many lines as there are kinds of modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config

import flashnorm
from flashnorm.runtime.build import Part
from flashnorm.runtime.summary import Row, rows, summary
from tests.kernels import cases
from tests.runtime.models import LLAMA, NEOX, QWEN3, tiny

WHY, OTHER = "its forward has been replaced", "it reads a parameter of another module"


def block(i, reason="", **options):
    """One norm with two readers, and a projection."""
    at = f"m.layers.{i}"
    a, b, o = (f"{at}.att.{name}" for name in "abo")
    linears = [Part(path, "linear", **options) for path in (a, b, o)]
    ahead = () if reason else (a, b)
    return [*linears, Part(f"{at}.norm", "norm", reason, ahead)]


def text(parts, kernels="avx2 kernels", attention="", folded=False, training=()):
    return summary(parts, kernels, attention, folded, training)


def report(config, layers=2, **options):
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:1] * layers
    model = flashnorm.accelerate_(tiny(config), huge_pages=False, **options)
    return str(flashnorm.acceleration(model))


def test_layers_share_a_row_and_siblings_a_name():
    assert rows([*block(0), *block(1), *block(2)]) == [
        Row("m.layers.{0-2}.norm", 3, "norm", "kernel", "att: a b"),
        Row("m.layers.{0-2}.att: a b", 6, "linear", "kernel", "norm"),
        Row("m.layers.{0-2}.att.o", 3, "linear", "kernel", ""),
    ]


def test_a_layer_that_is_refused_has_rows_of_its_own_after_the_others():
    found = rows([*block(0), *block(1, WHY), *block(2)])
    assert [(row.path, row.state, row.words) for row in found if row.kind == "norm"] == [
        ("m.layers.{0,2}.norm", "kernel", "att: a b"),
        ("m.layers.1.norm", "own code", WHY),
    ]
    assert found[-1].words == WHY
    # Its readers run on kernels all the same, without a norm.
    assert Row("m.layers.1.att: a b", 2, "linear", "kernel", "") in found
    assert sum(row.count for row in found) == 12


def test_reasons_are_not_mixed_up():
    parts = [Part(f"m.{i}.x", "linear", WHY if i % 2 else OTHER) for i in range(6)]
    assert [(row.path, row.count, row.words) for row in rows(parts)] == [
        ("m.{0,2,4}.x", 3, OTHER),
        ("m.{1,3,5}.x", 3, WHY),
    ]


def test_reasons_that_name_a_layer_are_one():
    parts = [Part(f"m.{i}.x", "linear", f"it reads 'm.{i}.y' at f.py:7") for i in (0, 1, 4)]
    (row,) = rows(parts)
    assert (row.path, row.words) == ("m.{0-1,4}.x", "it reads 'm.{0-1,4}.y' at f.py:7")


def test_attention_says_why_it_is_the_models_own():
    assert "attention of single tokens runs on a kernel" in text(block(0))
    shown = text(block(0), attention="the model has no attention by name")
    assert "single tokens runs on its own code: the model has no attention by name" in shown


def test_folded_gains_are_mentioned():
    assert "gains were folded" in text(block(0), folded=True)
    assert "gains were folded" not in text(block(0))


def test_training_names_those_that_save_nothing():
    trained = [*block(0), *(Part(f"m.layers.{i}.mix", "gated", WHY) for i in range(2))]
    lines = text(block(0), training=trained).splitlines()
    assert "in training 4 of 6 modules save less: 1 norm, 3 linear" in lines
    assert lines[-1].split() == ["m.layers.{0-1}.mix", "×2", "gated", "own", "code", *WHY.split()]


def test_one_reason_for_all_is_said_once():
    why = "there is no compiled library"
    shown = text([Part(f"m.{i}.x", "linear", why) for i in range(4)], kernels=why)
    assert shown.startswith(f"no module runs on kernels: {why}\n")
    assert shown.count(why) == 1
    assert "m.{0-3}.x ×4" in shown


def test_no_module_at_all():
    assert text([]).splitlines() == [
        "no norm and no linear layer was found",
        "attention of single tokens runs on a kernel",
    ]
    assert rows([]) == []


def test_the_model_itself_has_a_name():
    assert rows([Part("", "linear")])[0].path == "(the model itself)"


@cases.compiled
@pytest.mark.parametrize("config", [LLAMA, QWEN3, NEOX], ids=["llama", "qwen3", "neox"])
def test_a_model_takes_as_many_lines_as_it_has_kinds_of_modules(config):
    few, many = report(config), report(config, layers=30)
    assert len(few.splitlines()) == len(many.splitlines()) <= 14
    assert len(many) < len(few) + 200
    assert "{0-29}" in many
    assert "×30" in many


@cases.compiled
def test_a_llama_says_what_each_norm_computes():
    lines = [" ".join(line.split()) for line in report(LLAMA, 30, training=True).splitlines()]
    assert lines[0].startswith("302 of 302 modules run on ")
    norm = "model.layers.{0-29}.input_layernorm ×30 norm kernel self_attn: "
    assert norm + "k_proj q_proj v_proj" in lines
    readers = "model.layers.{0-29}.self_attn: q_proj k_proj v_proj ×90 linear kernel "
    assert readers + "input_layernorm" in lines
    assert lines[-1] == "in training 302 of 302 modules save less: 61 norm, 30 gated, 211 linear"
    assert len(lines) <= 14


@cases.compiled
def test_a_gpt2_says_what_each_norm_computes():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256)
    lines = [" ".join(line.split()) for line in report(config).splitlines()]
    assert lines[0].startswith("14 of 14 modules run on ")
    assert "transformer.h.{0-1}.ln_1 ×2 norm kernel attn.c_attn" in lines
    assert "transformer.h.{0-1}.attn.c_proj ×2 linear kernel" in lines


@cases.compiled
def test_a_model_without_either_is_said_to_have_none():
    model = flashnorm.accelerate_(nn.Sequential(nn.ReLU()), (torch.ones(2, 3),), huge_pages=False)
    found = flashnorm.acceleration(model)
    assert str(found).startswith("no norm and no linear layer was found")
    assert found.to_json()["parts"] == ()
