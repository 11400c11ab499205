"""Tiny random checkpoints of all causal-LM types, their reference logits, and flashnorm's fold.

    python -m benchmarks.peers.make_checkpoints --work DIR [type ...]

Per type a directory with `original/`, `flashnorm/` and `streamed/` (checkpoints, float32),
`inputs.safetensors`, `reference.safetensors` (logits of the original in float32 and in true
float64), `about.json` and `flashnorm.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import flashnorm
from benchmarks.peers.common import (
    Result,
    attempt,
    error,
    load,
    logits,
    read_inputs,
    run_all,
    true_logits,
    versions,
    write_inputs,
)
from flashnorm.plan import Plan
from tests.zoo import UNBUILDABLE, causal_lm_types, tiny_inputs, tiny_model


def make(work: Path, number: int, name: str) -> None:
    """Write the original, its inputs and its reference logits, or why that cannot be."""
    path = work / f"m{number:03}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    facts = {"name": name} | attempt(lambda: _original(path, name))
    if facts["outcome"] == "ran":
        (path / "about.json").write_text(json.dumps(facts, indent=1))
    else:
        (path / "left_out.json").write_text(json.dumps(facts, indent=1))
        print(f"{name:26} left out: {facts['error_class']}: {facts['message']}", flush=True)


def _original(path: Path, name: str) -> Result:
    tiny = tiny_model(name)
    tiny.save_pretrained(path / "original")
    write_inputs(path, tiny_inputs(tiny))
    inputs, model = read_inputs(path), load(path / "original")
    float32 = logits(model, inputs)
    reload_error = error(float32, logits(tiny, inputs))
    truth = true_logits(model.double(), inputs)
    rounding = error(true_logits(_nudged(model), inputs), truth)
    save_file(
        {"float32": float32.contiguous(), "truth": truth.contiguous()},
        path / "reference.safetensors",
    )
    return {
        "architecture": type(model).__name__,
        "reload_error": reload_error,
        "float32_error": error(float32, truth),
        "rounding": rounding,
    }


def _nudged(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight moved by one float32 rounding: what any fold into float32 may do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randint(-1, 2, parameter.shape, generator=generator).double()
            parameter.mul_(1 + step * torch.finfo(torch.float32).eps)
    return model


def fold(path: Path) -> Result:
    """Three ways to the same: in memory and saved; streamed on disk; all that `fold_` can do."""
    return {
        "memory": attempt(lambda: _memory(path)),
        "disk": attempt(lambda: _disk(path)),
        "all": attempt(lambda: _all(path)),
    }


def _memory(path: Path) -> Result:
    """`fold_`, then `save_pretrained`: what the peers' results are held against."""
    target = path / "flashnorm"
    shutil.rmtree(target, ignore_errors=True)
    model = load(path / "original")
    plan = flashnorm.folding(flashnorm.fold_(model, read_inputs(path)))
    model.save_pretrained(target)
    return _measured(path, plan, load(target), "flashnorm")


def _disk(path: Path) -> Result:
    """`fold_checkpoint`: where it refuses, its message says to fold in memory."""
    target = path / "streamed"
    shutil.rmtree(target, ignore_errors=True)
    plan = flashnorm.fold_checkpoint(path / "original", target)
    return _measured(path, plan, load(target), "streamed")


def _all(path: Path) -> Result:
    """Tied heads untied and LayerNorms centered, which a stock checkpoint cannot hold."""
    model = load(path / "original")
    plan = flashnorm.folding(flashnorm.fold_(model, read_inputs(path), untie=True, center=True))
    return _measured(path, plan, model, "all")


def _measured(path: Path, plan: Plan, model: torch.nn.Module, name: str) -> Result:
    reference, inputs = load_file(path / "reference.safetensors"), read_inputs(path)
    found = logits(model, inputs)
    truth = true_logits(model.double(), inputs)
    tensors = {"float32": found.contiguous(), "truth": truth.contiguous()}
    save_file(tensors, path / f"{name}.safetensors")
    states = Counter(site.gain_state for site in plan.sites)
    return {
        "error_float32": error(found, reference["float32"]),
        "error_truth": error(truth, reference["truth"]),
        "sites": len(plan.sites),
        "folded": states["folded"],
        "kept": states["kept"],
        "no_gain": states["none"],
        "centered": sum(site.centering == "folded" for site in plan.sites),
        "reasons": sorted({s.reason for s in plan.sites if s.gain_state == "kept"}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--fold-only", action="store_true", help="keep the originals")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not options.fold_only:
        for number, name in enumerate(causal_lm_types()):
            if name not in UNBUILDABLE and (not options.types or name in options.types):
                make(options.work, number, name)
    run_all(options.work, options.types, "flashnorm", fold)
    facts = versions() | {"flashnorm": flashnorm.__version__}
    (options.work / "versions-flashnorm.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
