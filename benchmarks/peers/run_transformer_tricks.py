"""Fold the tiny checkpoints with transformer-tricks, and run what it wrote in stock transformers.

    python -m benchmarks.peers.run_transformer_tricks --work DIR [type ...]

`transformer_tricks.flashify` is what its `flashify_repo` calls between reading and writing; called
here directly, because `flashify_repo` asks the hub about the path and wants a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from pathlib import Path

import torch
import transformer_tricks
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.utils import logging

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
)


def run(path: Path) -> Result:
    return attempt(lambda: _run(path))


def _run(path: Path) -> Result:
    changed = _fold(path / "original", path / "transformer-tricks")
    reference, inputs = load_file(path / "reference.safetensors"), read_inputs(path)
    ours = load_file(path / "flashnorm.safetensors")
    model = load(path / "transformer-tricks")
    found = logits(model, inputs)
    truth = true_logits(model.double(), inputs)
    return {
        "changed": changed,
        "error_float32": error(found, reference["float32"]),
        "error_truth": error(truth, reference["truth"]),
        "from_flashnorm": error(truth, ours["truth"]),
    }


def _fold(source: Path, target: Path) -> int:
    """Write the folded checkpoint; returns how many of its tensors differ from the original."""
    shutil.rmtree(target, ignore_errors=True)
    config = AutoConfig.from_pretrained(source)
    original = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    folded = dict(original)
    transformer_tricks.flashify(folded, config, False)
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = {name: tensor.contiguous() for name, tensor in folded.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return sum(not torch.equal(folded[name], original[name]) for name in original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("types", nargs="*")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    run_all(options.work, options.types, "transformer-tricks", run)
    facts = versions("transformer-tricks")
    (options.work / "versions-transformer-tricks.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
