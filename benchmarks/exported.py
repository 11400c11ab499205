"""How far exported models are from the truth: original and folded, side by side.

Errors of logits, max|Δ| / max|truth| and ‖Δ‖ / ‖truth‖, against the original in float64, in float32
throughout; by PyTorch, by onnxruntime (torch.onnx.export), by OpenVINO from that file, and by
OpenVINO from the module. Nothing is timed: any machine does.

    python -m benchmarks.exported demo-output/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import torch
from torch import Tensor, nn

import flashnorm
from flashnorm.verification import float64_truth
from flashnorm.verification.inputs import TEXT

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits: Tensor = self.model(**given, use_cache=False).logits
        return logits


@torch.no_grad()
def found(model: Any, given: dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The logits of every runtime."""
    module, arrays = Logits(model), {name: value.numpy() for name, value in given.items()}
    yield "PyTorch", module(**given)
    sizes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in given}
    program: Any = torch.onnx.export(
        module, kwargs=given, dynamic_shapes=sizes, dynamo=True, verbose=False
    )
    file = folder / "model.onnx"
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    yield "onnxruntime", torch.from_numpy(session.run(None, arrays)[0])
    converted = {
        "OpenVINO, from ONNX": openvino.convert_model(file),
        "OpenVINO, from the module": openvino.convert_model(module, example_input=given),
    }
    for name, graph in converted.items():
        run = openvino.compile_model(graph, "CPU", EXACT)
        yield name, torch.from_numpy(run(arrays)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a directory of a causal language model with its tokenizer")
    parser.add_argument("--tokens", type=int, default=64, help="in each of two sequences")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = files("flashnorm.data").joinpath(TEXT).read_text("utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text)["input_ids"])
    ids = ids[: 2 * args.tokens].view(2, -1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    wide = copy.deepcopy(original).double()
    with float64_truth():
        truth = wide(**given, use_cache=False).logits
    del wide
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES), "\n")
    print("| weights | run by | largest error | root mean square |\n| --- | --- | ---: | ---: |")
    for row in ("original", "folded"):
        model = original if row == "original" else flashnorm.fold_(original, untie=True)
        with tempfile.TemporaryDirectory() as folder:
            for name, logits in found(model, given, Path(folder)):
                error = logits.double() - truth
                largest = float(error.abs().max() / truth.abs().max())
                mean = float(error.norm() / truth.norm())
                print(f"| {row} | {name} | {largest:.1e} | {mean:.1e} |", flush=True)


if __name__ == "__main__":
    main()
