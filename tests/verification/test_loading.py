"""Loading names what is missing and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashnorm import CheckpointError, FlashNormError, verify
from flashnorm.demo import _clear
from flashnorm.loading import load_model, load_tokenizer, locate

from . import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_directory_loads_in_its_stored_dtype(tmp_path: Path) -> None:
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path, torch.float64).parameters()} == {torch.float64}
    assert load_tokenizer(tmp_path) is None


def test_two_directories_are_verified(saved: Path, tmp_path: Path) -> None:
    tiny.folded(tiny.llama()).save_pretrained(tmp_path / "folded")
    report = verify(saved, tmp_path / "folded", tokens=128, sample=128)
    assert report.ok, str(report)
    assert report.reference == str(saved)


def test_the_class_that_the_config_names_is_loaded(tmp_path: Path) -> None:
    tiny.bert().save_pretrained(tmp_path)
    assert type(load_model(tmp_path)).__name__ == "BertModel"


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FlashNormError, match="nowhere does not exist: give a directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FlashNormError, match=r"x\.gguf does not exist"):
        locate("x.gguf")
    with pytest.raises(FlashNormError, match=r"holds no config\.json and no GGUF file"):
        load_model(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FlashNormError, match=r"a\.txt is a file but no GGUF file"):
        load_model(tmp_path / "a.txt")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("x")
    with pytest.raises(FlashNormError, match="2 GGUF files"):
        load_model(tmp_path)


def test_a_file_that_is_no_gguf_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("not a model")
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*a\.gguf"):
        load_model(tmp_path / "a.gguf")


def test_a_hub_id_is_a_hub_id() -> None:
    assert locate("organization/some-model") == {
        "pretrained_model_name_or_path": "organization/some-model"
    }


def test_missing_tensors_are_not_filled_with_random_numbers(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* model\.layers\.0\.mlp\.up_proj"):
        load_model(saved)


def test_a_strict_fold_may_leave_out_its_gains_and_nothing_else(saved: Path) -> None:
    file, config = saved / "model.safetensors", json.loads((saved / "config.json").read_text())
    tensors = load_file(file)
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="input_layernorm"):
        load_model(saved)
    (saved / "config.json").write_text(json.dumps({**config, "flashnorm_folded": True}))
    gain = load_model(saved).get_parameter("model.layers.0.input_layernorm.weight")
    assert bool((gain == 1).all())


def test_the_demo_removes_only_what_flashnorm_wrote(tmp_path: Path) -> None:
    place = tmp_path / "folded"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(FlashNormError, match="no checkpoint that flashnorm folded"):
        _clear(place)
    (place / "config.json").write_text('{"flashnorm": {}}')
    _clear(place)
    assert not place.exists()
