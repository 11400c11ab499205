"""Folded and accelerated models as other runtimes get them: what they compute, and what is left."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx", reason="torch.onnx.export needs it")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
onnxruntime = pytest.importorskip("onnxruntime", reason="the exported graphs are run by it")
openvino = pytest.importorskip("openvino", reason="the converted models are run by it")

import flashnorm  # noqa: E402
from flashnorm.verification import float64_truth  # noqa: E402
from tests.errors import relative, rounding  # noqa: E402
from tests.zoo import randomize_  # noqa: E402

from .models import FAMILIES, write  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
GIVEN = {
    "input_ids": torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 12, dtype=torch.int64),
}
SHORTER = {name: value[:1, :5].clone() for name, value in GIVEN.items()}
ANY = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in GIVEN}
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
DEPTH = 20  # products and norms that the data of two layers passes, one after the other
FAMILY = ("llama", "gemma2", "gpt-neox")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits: Tensor = self.model(**given, use_cache=False).logits
        return logits


class Failing(Logits):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        super().forward(input_ids, attention_mask)
        raise ZeroDivisionError("on purpose")


Run = Callable[[dict[str, Tensor]], Tensor]


def by_onnx(module: nn.Module, folder: Path) -> tuple[Run, set[str]]:
    program: Any = torch.onnx.export(
        module, kwargs=GIVEN, dynamic_shapes=ANY, dynamo=True, verbose=False
    )
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    operators = {f"{node.domain}::{node.op_type}" for node in program.model.graph.all_nodes()}
    return lambda given: torch.from_numpy(session.run(None, _arrays(given))[0]), operators


def by_openvino(module: nn.Module, folder: Path) -> tuple[Run, set[str]]:
    return _compiled(openvino.convert_model(module, example_input=GIVEN))


def by_openvino_from_onnx(module: nn.Module, folder: Path) -> tuple[Run, set[str]]:
    by_onnx(module, folder)
    return _compiled(openvino.convert_model(folder / "model.onnx"))


def by_openvino_from_export(module: nn.Module, folder: Path) -> tuple[Run, set[str]]:
    program = torch.export.export(module, (), GIVEN, dynamic_shapes=ANY)
    run, operators = _compiled(openvino.convert_model(program))
    return run, operators | {str(node.target) for node in program.graph.nodes}


def by_torch_export(module: nn.Module, folder: Path) -> tuple[Run, set[str]]:
    program = torch.export.export(module, (), GIVEN, dynamic_shapes=ANY)
    run = program.module()
    return lambda given: run(**given), {str(node.target) for node in program.graph.nodes}


def by_jit_trace(module: nn.Module, folder: Path) -> tuple[Run, set[str]]:
    traced = torch.jit.trace(module, example_kwarg_inputs=GIVEN)
    nodes = traced.inlined_graph.nodes()  # type: ignore[attr-defined]
    return lambda given: traced(**given), {node.kind() for node in nodes}


EXPORTERS = (
    by_onnx,
    by_openvino,
    by_openvino_from_onnx,
    by_openvino_from_export,
    by_torch_export,
    by_jit_trace,
)


def _compiled(converted: Any) -> tuple[Run, set[str]]:
    compiled = openvino.compile_model(converted, "CPU", EXACT)
    kinds = {str(op.get_type_info()) for op in converted.get_ops()}
    return lambda given: torch.from_numpy(compiled(_arrays(given))[0]), kinds


def _arrays(given: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in given.items()}


def a_model(family: str) -> Any:
    kind, config = FAMILIES[family]
    model = kind(copy.deepcopy(config)).eval()
    randomize_(model, 0)
    return model


def truth(model: Any, given: dict[str, Tensor]) -> Tensor:
    wide = copy.deepcopy(model).double()
    with float64_truth():
        logits: Tensor = wide(**given).logits
    return logits


def bound(model: Any) -> float:
    return rounding(model.config.intermediate_size, DEPTH, torch.float32)


def state(model: nn.Module) -> list[tuple[dict[str, Any], Any, Any]]:
    """What every module holds, its forward among it, and how the model attends."""
    tables = [dict(vars(module)) for module in model.modules()]
    return [(held.get("forward"), held.keys()) for held in tables]


@pytest.mark.parametrize("exporter", [by_onnx, by_openvino, by_openvino_from_onnx])
@pytest.mark.parametrize("family", FAMILY)
@torch.no_grad()
def test_a_folded_model_is_exported_as_near_to_the_truth(family, exporter, tmp_path):
    original = a_model(family)
    folded = flashnorm.fold_(copy.deepcopy(original), untie=True, center=True)
    assert len(flashnorm.folding(folded).folded) >= 4
    for model in (original, folded):
        run, _ = exporter(Logits(model), tmp_path)
        for given in (GIVEN, SHORTER):
            assert relative(run(given).double(), truth(original, given)) < bound(original)


@torch.no_grad()
def test_a_folded_checkpoint_is_exported(tmp_path):
    source = write("gpt-neox", tmp_path / "model")
    flashnorm.fold_checkpoint(source, tmp_path / "folded", untie=True)
    kind, _ = FAMILIES["gpt-neox"]
    original, folded = (kind.from_pretrained(tmp_path / n).eval() for n in ("model", "folded"))
    run, _ = by_onnx(Logits(folded), tmp_path)
    expected = truth(original, GIVEN)
    found = run(GIVEN)
    assert relative(found.double(), expected) < bound(original)
    assert relative(found, folded(**GIVEN).logits) < bound(original)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("within", [True, False], ids=("original", "as it is"))
@torch.no_grad()
def test_an_accelerated_model_is_exported_as_its_original(exporter, within, tmp_path):
    plain = a_model("llama")
    model = flashnorm.accelerate_(copy.deepcopy(plain))
    accelerated = model(**GIVEN).logits
    assert not torch.equal(accelerated, plain(**GIVEN).logits), "no kernel ran: nothing is tested"
    before = state(model)
    with flashnorm.original(model) if within else nullcontext():
        run, operators = exporter(Logits(model), tmp_path)
    expected, _ = exporter(Logits(plain), tmp_path)
    assert operators
    assert not [name for name in operators if "flashnorm" in name.lower()]
    for given in (GIVEN, SHORTER):
        assert torch.equal(run(given), expected(given))
    assert state(model) == before
    assert torch.equal(model(**GIVEN).logits, accelerated)


@pytest.mark.parametrize("exporter", [by_onnx, by_openvino, by_torch_export, by_jit_trace])
@torch.no_grad()
def test_after_an_error_of_the_exporter_a_model_is_accelerated_again(exporter, tmp_path):
    model = flashnorm.accelerate_(a_model("llama"))
    accelerated, before = model(**GIVEN).logits, state(model)
    attention = model.config._attn_implementation
    with pytest.raises(Exception, match="on purpose"), flashnorm.original(model):
        exporter(Failing(model), tmp_path)
    assert state(model) == before
    assert model.config._attn_implementation == attention
    assert torch.equal(model(**GIVEN).logits, accelerated)


def test_the_page(tmp_path, monkeypatch, capfd):
    """Every block of the page, in their order, on a small model in the place of the demo's."""
    place = tmp_path / "demo-output" / "SmolLM2-135M-Instruct"
    place.parent.mkdir()
    write("llama", place)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for text in BLOCKS:
        exec(compile(text, "export.md", "exec"), names)
    kind, _ = FAMILIES["llama"]
    original = kind.from_pretrained(place).eval()
    with torch.no_grad():
        expected = truth(original, names["GIVEN"])
        for found in (names["logits"], names["session"].run(None, _arrays(names["GIVEN"]))[0]):
            assert relative(torch.from_numpy(found).double(), expected) < bound(original)
