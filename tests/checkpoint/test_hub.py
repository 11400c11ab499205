"""`inspect` of a hub id: the config, headers and gains are asked for, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import flashnorm
from flashnorm.checkpoint import hub as ours
from flashnorm.errors import CheckpointError
from tests.hub import serve

transformers = pytest.importorskip("transformers")
constants = pytest.importorskip("huggingface_hub").constants


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`one` in a file, `many` in shards, and `ones`, whose last gain is one; wide vocabularies."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=4000,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="300KB")
    model.model.norm.weight.data.fill_(1)
    model.save_pretrained(folder / "ones")
    assert len(list((folder / "many").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    with serve(models) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def without_notes(plan):
    return replace(plan, notes=())


@pytest.mark.parametrize("name", ["one", "many", "ones"])
def test_the_plan_is_the_one_of_the_files(name, hub, models):
    assert flashnorm.inspect(f"org/{name}") == flashnorm.inspect(models / name)


def test_a_gain_that_is_one_is_seen_from_afar(hub):
    states = [site.gain_state for site in flashnorm.inspect("org/ones").sites]
    assert states == ["folded"] * 4 + ["none"]


@pytest.mark.parametrize("name", ["one", "many"])
def test_only_headers_and_gains_are_asked_for(name, hub, models):
    flashnorm.inspect(f"org/{name}")
    gains = [t for t in load_file(models / "one" / "model.safetensors").values() if t.ndim == 1]
    parts = hub.parts()
    assert all(request[0] == "GET" and len(request) == 4 for request in parts), "never a whole one"
    heads = [request for request in parts if request[2] == 0]
    others = [request for request in parts if request[2] != 0]
    assert {end for *_, end in heads} == {ours.FIRST}
    assert sorted(end - start for *_, start, end in others) == sorted(t.nbytes for t in gains)
    whole = sum(file.stat().st_size for file in (models / name).glob("*.safetensors"))
    assert whole > 1_000_000
    files = {file.name for file in (models / name).iterdir()} - {"generation_config.json"}
    assert {request[1] for request in hub.requests} <= files | {
        "model.safetensors",
        "model.safetensors.index.json",
    }


def test_a_header_longer_than_the_first_part(hub, models, monkeypatch):
    monkeypatch.setattr(ours, "FIRST", 100)
    assert flashnorm.inspect("org/one") == flashnorm.inspect(models / "one")
    first, second = hub.parts()[:2]
    assert (first[2:], second[2]) == ((0, 100), 100)


def test_files_that_lie_elsewhere(hub, models):
    hub.moved = True
    assert flashnorm.inspect("org/one") == flashnorm.inspect(models / "one")
    assert len(hub.parts()) == 2 * (1 + 5)


def test_nothing_is_read_of_a_server_that_sends_files_whole(hub, models):
    hub.whole = True
    plan = flashnorm.inspect("org/one")
    assert (
        "the weights were not read: the hub sends model.safetensors of org/one as a whole"
        in (plan.notes[0])
    )
    assert [site.gain_state for site in plan.sites] == ["folded"] * 5


def test_gains_that_are_lost_on_the_way_are_said(hub):
    hub.lost = ("model.safetensors", 2)
    plan = flashnorm.inspect("org/ones")
    assert "gains were not read: " in plan.notes[0]
    assert "answers 503 for model.safetensors of org/ones: try again later" in plan.notes[0]
    asked = hub.parts()  # those that wait when one fails are not asked for at all
    assert 2 <= len(asked) <= 1 + 5
    assert len({*map(tuple, asked)}) == len(asked), "a gain that failed is not asked for again"


def test_a_tied_weight_that_is_stored_twice_is_not_compared(hub, models, tmp_path_factory):
    folder = models / "twice"
    if not folder.exists():
        folder.mkdir()
        for file in (models / "one").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    notes = flashnorm.inspect("org/twice").notes
    assert any("the checkpoint holds both: whether they are equal is told once" in n for n in notes)
    assert all(end - start <= ours.FIRST for *_, start, end in hub.parts())


def test_quantized_weights_are_not_asked_for(hub, models):
    folder = models / "quantized"
    folder.mkdir(exist_ok=True)
    config = json.loads((models / "one" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "x"}
    (folder / "config.json").write_text(json.dumps(config))
    plan = flashnorm.inspect("org/quantized")
    assert {site.gain_state for site in plan.sites} == {"kept"}
    assert hub.parts() == []


def test_a_config_alone(hub, models):
    (models / "bare").mkdir(exist_ok=True)
    (models / "bare" / "config.json").write_bytes((models / "one" / "config.json").read_bytes())
    plan = flashnorm.inspect("org/bare")
    assert "the weights were not read: org/bare has neither model.safetensors nor" in plan.notes[0]


def test_both_a_file_and_an_index(hub, models):
    folder = models / "both"
    folder.mkdir(exist_ok=True)
    for file in (*(models / "many").iterdir(), models / "one" / "model.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert "has both model.safetensors and" in flashnorm.inspect("org/both").notes[0]


def test_a_header_that_lies_is_refused(hub, models):
    folder = models / "cut"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((models / "one" / "config.json").read_bytes())
    whole = (models / "one" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    notes = flashnorm.inspect("org/cut").notes
    assert "the weights were not read: model.safetensors is truncated" in notes[0]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nothing", "org/nothing is no local path, and http://.* has no such model or does not"),
        ("gated", r"org/one is gated: accept its terms at http://\S+/org/one, then sign in with"),
        ("private", "org/one is no local path, and http://.* has no such model or does not show"),
        ("empty", "org/empty has no config.json on the hub: it is no checkpoint of transformers"),
        ("offline", "config.json of org/one is not in the hub's cache, and HF_HUB_OFFLINE forbids"),
        ("down", "org/one is no local path, and http://.* cannot be reached for its config.json"),
    ],
)
def test_what_cannot_be_had_is_one_clear_error(what, words, hub, models, monkeypatch):
    (models / "empty").mkdir(exist_ok=True)
    hub.gated, hub.private = what == "gated", what == "private"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", what == "offline")
    if what == "down":
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between what the client tries
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    name = f"org/{what}" if what in ("nothing", "empty") else "org/one"
    with pytest.raises(CheckpointError, match=words):
        flashnorm.inspect(name)


def test_offline_the_cache_is_read(hub, models, monkeypatch):
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/ones", "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    notes = flashnorm.inspect("org/ones").notes
    assert "the weights were not read: model.safetensors" in notes[0]
    assert "HF_HUB_OFFLINE forbids" in notes[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hf_hub_download("org/ones", "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert flashnorm.inspect("org/ones") == flashnorm.inspect(models / "ones")
    assert hub.requests == []
