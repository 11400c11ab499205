"""What the scripts of all environments share: files of one model, logits, errors, outcomes.

Needs torch, transformers and safetensors, and `flashnorm.verification.precision` (torch only).
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

from flashnorm.verification.precision import float64_truth

Result = dict[str, Any]
MESSAGE = 160  # characters of an error that are kept


def models(work: Path, names: list[str]) -> list[Path]:
    """Directories of the models, in the order of their names; all, or the named ones.

    Called m000, m001, ... because TransformerLens reads architectures out of path names.
    """
    found = [path for path in sorted(work.glob("m*")) if (path / "about.json").exists()]
    return [path for path in found if not names or about(path)["name"] in names]


def about(path: Path) -> Result:
    return json.loads((path / "about.json").read_text())


def write_inputs(path: Path, inputs: dict) -> None:
    """Tensors, tuples of tensors as `name.0`, `name.1`, and flags as tensors without an axis."""
    flat = {}
    for key, value in inputs.items():
        if isinstance(value, (Tensor, bool)):
            flat[key] = torch.as_tensor(value).contiguous()
        else:
            flat |= {f"{key}.{i}": part.contiguous() for i, part in enumerate(value)}
    save_file(flat, path / "inputs.safetensors")


def read_inputs(path: Path) -> dict:
    inputs: dict[str, Any] = {}
    for key, value in sorted(load_file(path / "inputs.safetensors").items()):
        name, dot, _ = key.partition(".")
        plain = value if value.ndim else value.item()
        inputs[name] = (*inputs.get(name, ()), value) if dot else plain
    return inputs


def load(path: Path) -> nn.Module:
    """A checkpoint in stock transformers, float32, eager attention."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    return model.eval()


def logits(model: Callable, inputs: dict) -> Tensor:
    """In the model's own precision."""
    with torch.no_grad():
        return logits_of(model(**inputs))


def true_logits(model: Callable, inputs: dict) -> Tensor:
    """In float64 throughout, of a model that was moved to float64."""
    wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    with float64_truth():
        return logits_of(model(**wide))


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def error(found: Tensor, expected: Tensor) -> float:
    """max |Δlogit| / max |logit|."""
    if found.shape != expected.shape:
        raise ValueError(f"logits {tuple(found.shape)} where {tuple(expected.shape)} are expected")
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


def attempt(work: Callable[[], Result]) -> Result:
    """What `work` returns, or the class and first words of its error."""
    try:
        return {"outcome": "ran"} | work()
    except Exception as problem:
        words = " ".join(str(problem).split())[:MESSAGE]
        return {"outcome": "raised", "error_class": type(problem).__name__, "message": words}


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """The texts of the warnings given meanwhile that speak of folding or centering."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    said = {" ".join(str(w.message).split())[:MESSAGE] for w in caught}
    texts.extend(sorted(t for t in said if "fold" in t.lower() or "center" in t.lower()))


def versions(*packages: str) -> dict[str, str]:
    return {p: version(p).split("+")[0] for p in ("torch", "transformers", *packages)}


def run_all(work: Path, names: list[str], key: str, one: Callable[[Path], Result]) -> None:
    """Run `one` on every model, and write `<key>.json` beside each as soon as it is there."""
    torch.set_num_threads(1)
    for path in models(work, names):
        started = time.perf_counter()
        result = one(path)
        (path / f"{key}.json").write_text(json.dumps(result, indent=1))
        line = json.dumps(result)[:200]
        print(f"{about(path)['name']:26} {time.perf_counter() - started:5.1f} s {line}", flush=True)
