"""Packages in a directory: found again, refused where they do not fit, and never half of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

import flashnorm
from flashnorm.runtime.package import make
from tests.runtime.models import LLAMA, QWEN3, SIZES, tiny
from tests.runtime.packages import LENGTH

pytestmark = pytest.mark.usefixtures("only_compiled")


def damaged(place):
    library = place / "step.so"
    library.write_bytes(library.read_bytes()[:-100] + bytes(100))


def foreign(place):
    held = json.loads((place / "step.json").read_text())
    held["fingerprint"]["torch"] = "1.0"
    (place / "step.json").write_text(json.dumps(held))


BROKEN = {
    "is damaged: step.so is not": damaged,
    "was made for something else: torch '1.0', not": foreign,
    r"is damaged \(JSONDecodeError": lambda place: (place / "step.json").write_text("{"),
    r"is damaged \(FileNotFoundError": lambda place: (place / "step.so").unlink(),
    r"is damaged \(TypeError": lambda place: (place / "step.json").write_text("[]"),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_package_that_cannot_be_used_is_refused(pair, directory, tmp_path, words):
    _, model = pair()
    place = Path(flashnorm.acceleration(model).package)
    shutil.copytree(place, tmp_path / place.name)
    BROKEN[words](tmp_path / place.name)
    again = tiny()
    before = {name: dict(vars(m)) for name, m in again.named_modules()}
    with pytest.raises(flashnorm.FlashNormError, match=f"{place.name} {words}.*delete it"):
        flashnorm.accelerate_(again, package=flashnorm.Package(tmp_path, LENGTH))
    assert {name: dict(vars(m)) for name, m in again.named_modules()} == before


def test_a_library_of_another_model_is_noticed(pair, monkeypatch, tmp_path):
    """Should a fingerprint say too little, the first step does not agree."""
    _, model = pair()
    shutil.copytree(Path(flashnorm.acceleration(model).package), tmp_path / "p")
    other = tiny()
    other.config.rms_norm_eps = 7.0
    for module in other.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 7.0
    held = json.loads((tmp_path / "p" / "step.json").read_text())["fingerprint"]
    monkeypatch.setattr(make, "fingerprint", lambda *_: held)
    monkeypatch.setattr(make, "name", lambda *_: "p")
    with pytest.raises(flashnorm.FlashNormError, match="computes something else than the model"):
        flashnorm.accelerate_(other, package=flashnorm.Package(tmp_path, LENGTH))


def test_models_that_differ_have_packages_of_their_own(pair):
    places = {flashnorm.acceleration(pair(c)[1]).package for c in (LLAMA, QWEN3)}
    places |= {flashnorm.acceleration(pair(batch=2)[1]).package}
    places |= {flashnorm.acceleration(pair(dtype=torch.bfloat16)[1]).package}
    assert len(places) == 4


def test_what_cannot_be_packaged_is_refused(tmp_path):
    window = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    cases = [
        (tiny(window), "StaticSlidingWindowLayer"),
        (tiny().train(), "training"),
        (torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)), "from transformers"),
    ]
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}  # by the length so far
    cases.append((tiny(LlamaConfig(**SIZES, rope_parameters=scaled)), "no single graph|stores"))
    hooked = tiny()
    hooked.model.norm.register_forward_hook(lambda _, __, y: y)
    for model, words in [*cases, (hooked, "model.norm has hooks")]:
        inputs = {"input": torch.randn(2, 8)} if "transformers" in words else None
        with pytest.raises(flashnorm.FlashNormError, match=words):
            flashnorm.accelerate_(model, inputs, package=tmp_path)
        assert not list(tmp_path.iterdir())
        assert not any("forward" in vars(m) for m in model.modules())


def test_a_failed_compilation_leaves_nothing(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("no compiler")

    monkeypatch.setattr("flashnorm.runtime.package.compiled.aot_compiler", broken)
    with pytest.raises(flashnorm.FlashNormError, match=r"could not be compiled.*no compiler"):
        flashnorm.accelerate_(tiny(), package=flashnorm.Package(tmp_path, LENGTH))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("length", "batch"), [(1, 1), (8, 0)])
def test_impossible_packages(length, batch):
    with pytest.raises(flashnorm.FlashNormError, match="one sequence or more"):
        flashnorm.Package("d", length, batch)
