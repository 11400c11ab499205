"""The plugin of SGLang, on its own hook registry, and on the signatures of its own loader.

SGLang's loader itself is not run: it needs kernels for a GPU.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import flashnorm
from flashnorm.engines import sglang_plugin
from flashnorm.errors import FlashNormError

from . import models

hooks = pytest.importorskip("sglang.srt.plugins.hook_registry")
pytestmark = pytest.mark.filterwarnings("ignore:.*left out")


def theirs(*names: str) -> ast.AST:
    """The syntax tree of a name inside of SGLang's loader."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    file = Path(spec.submodule_search_locations[0]) / "srt/model_loader/loader.py"
    found: Any = ast.parse(file.read_text())
    for name in names:
        found = next(node for node in found.body if getattr(node, "name", None) == name)
    return found


def test_the_loader_is_what_the_hook_is_written_for():
    method: Any = theirs("DefaultModelLoader", "_get_weights_iterator")
    assert [argument.arg for argument in method.args.args] == ["self", "source"]
    assert "resolved_source" in [argument.arg for argument in method.args.kwonlyargs]
    source: Any = theirs("DefaultModelLoader", "Source")
    fields = {node.target.id for node in source.body if isinstance(node, ast.AnnAssign)}
    assert fields >= {"model_or_path", "prefix", "model_config"}
    resolved: Any = theirs("DefaultModelLoader", "ResolvedSource")
    fields = {node.target.id for node in resolved.body if isinstance(node, ast.AnnAssign)}
    assert "hf_folder" in fields


@dataclass
class ModelConfig:
    is_generation: bool = True


@dataclass
class Source:
    model_or_path: str
    prefix: str
    model_config: ModelConfig


@dataclass
class Options:
    enable_lora: bool | None = None
    lora_paths: Any = None
    speculative_algorithm: str | None = None


class Loader:
    """In the place of SGLang's own: the tensors as they are."""

    def _get_weights_iterator(self, source: Source, *, resolved_source: Any = None):
        for name, tensor in load_file(Path(source.model_or_path) / "model.safetensors").items():
            yield source.prefix + name, tensor


@pytest.fixture
def loads(monkeypatch):
    """Loads a checkpoint as SGLang would once its plugins are there."""
    options = Options()
    standing = types.ModuleType("sglang.srt.model_loader.loader")
    standing.DefaultModelLoader = type("DefaultModelLoader", (Loader,), dict(vars(Loader)))
    context = types.ModuleType("sglang.srt.runtime_context")
    context.get_server_args = lambda: options
    for module in (standing, context):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    parent = types.ModuleType("sglang.srt.model_loader")
    parent.loader = standing
    monkeypatch.setitem(sys.modules, parent.__name__, parent)
    hooks.HookRegistry.reset()
    sglang_plugin.register()
    hooks.HookRegistry.apply_hooks()

    def load(path: Path, prefix: str = "", **given: Any) -> dict[str, torch.Tensor]:
        vars(options).update(vars(Options()) | given)
        source = Source(str(path), prefix, ModelConfig(not given.pop("pooled", False)))
        return dict(standing.DefaultModelLoader()._get_weights_iterator(source))

    yield load
    hooks.HookRegistry.reset()


@pytest.fixture(params=models.FAMILIES)
def checkpoint(request, tmp_path):
    return models.write(request.param, tmp_path / "plain")


def same(found, wanted, prefix=""):
    assert found.keys() == {prefix + name for name in wanted}
    for name, value in wanted.items():
        assert torch.equal(found[prefix + name], value), name


def test_a_plain_checkpoint_is_left_alone(loads, checkpoint):
    same(loads(checkpoint, "p."), load_file(checkpoint / "model.safetensors"), "p.")


def test_a_strict_checkpoint_gets_its_gains_back(loads, checkpoint, tmp_path):
    flashnorm.fold_checkpoint(checkpoint, tmp_path / "strict", strict=True)
    flashnorm.fold_checkpoint(checkpoint, tmp_path / "compat")
    same(loads(tmp_path / "strict"), load_file(tmp_path / "compat" / "model.safetensors"))


def test_a_plain_checkpoint_is_folded_where_it_is_asked_for(
    loads, checkpoint, tmp_path, monkeypatch
):
    flashnorm.fold_checkpoint(checkpoint, tmp_path / "compat")
    monkeypatch.setenv(sglang_plugin.FOLD, "1")
    wanted = load_file(tmp_path / "compat" / "model.safetensors")
    same(loads(checkpoint, "p."), wanted, "p.")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"enable_lora": True}, "adapters"),
        ({"lora_paths": ["a"]}, "adapters"),
        ({"speculative_algorithm": "EAGLE3"}, "a draft model (eagle3)"),
        ({"pooled": True}, "hidden states themselves"),
    ],
)
def test_what_nobody_would_see_is_refused(loads, tmp_path, monkeypatch, given, why):
    checkpoint = models.write("llama", tmp_path / "plain")
    monkeypatch.setenv(sglang_plugin.FOLD, "1")
    with pytest.raises(FlashNormError) as raised:
        loads(checkpoint, **given)
    assert why in str(raised.value)


def test_drafts_by_tokens_are_not_refused(loads, tmp_path, monkeypatch):
    checkpoint = models.write("llama", tmp_path / "plain")
    monkeypatch.setenv(sglang_plugin.FOLD, "1")
    assert loads(checkpoint, speculative_algorithm="NGRAM")
