"""Verifying a checkpoint that does not fit in memory: time, peak memory, and what is found.

Writes a synthetic checkpoint of the shapes of an 8B Llama (bf16, random weights and gains, as many
layers as the size takes), folds it, and verifies the fold from disk in a process of its own. Then
one weight of the fold is made wrong, and the same is asked again. A small one of the same kind is
verified from disk and in memory. Prints a table and writes PREFIX.json and PREFIX.md; the work
directory is removed at the end.

    python -m benchmarks.larger_than_memory --workdir DIR --gigabytes 21 --out PREFIX
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import flashnorm
from benchmarks.streaming import HIDDEN, INNER, KV, VOCAB, layers_for, make_checkpoint
from flashnorm.bench.machine import describe, line
from flashnorm.checkpoint.source import open_source

CHILD = """
import json, resource, sys, time
import flashnorm
start, how = time.perf_counter(), json.loads(sys.argv[3])
report = flashnorm.verify(sys.argv[1], sys.argv[2], **how)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "report": report.to_json()}))
"""
SMALL_LAYERS = 2
WRONG = "model.layers.{}.mlp.up_proj.weight"


def llama_config(layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 128,
        "num_key_value_heads": KV // 128,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def made(path: Path, layers: int) -> Path:
    make_checkpoint(path, layers)
    (path / "config.json").write_text(json.dumps(llama_config(layers)))
    return path


def verified(reference: Path, candidate: Path, stream: bool, sample: int) -> dict[str, Any]:
    """What verify says, in a process of its own, with its seconds and its peak memory."""
    command = [sys.executable, "-c", CHILD, str(reference), str(candidate)]
    command.append(json.dumps({"stream": stream, "sample": sample}))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spoil(path: Path, tensor: str, index: int, by: float) -> None:
    """Add to one element of a bf16 tensor of a checkpoint, in its file."""
    source = open_source(path)
    place = source.where[tensor]
    start = len(source.shards[place.shard].raw) + place.entry.start + 2 * index
    with open(path / place.shard, "r+b") as file:
        file.seek(start)
        value = torch.frombuffer(bytearray(file.read(2)), dtype=torch.bfloat16)
        file.seek(start)
        file.write((value + by).view(torch.uint8).numpy().tobytes())


def row(what: str, found: dict[str, Any]) -> dict[str, Any]:
    report = found["report"]
    wrong = report["first_wrong_layer"]
    return {
        "what": what,
        "ok": report["ok"],
        "float64_error": report["float64"]["max"],
        "float64_bound": report["float64_bound"],
        "first_wrong": None if wrong is None else wrong["path"],
        "wrong_weight": (report["weights"] or {}).get("first", ""),
        "seconds": found["seconds"],
        "peak_gb": found["peak"] / 1e9,
    }


def measured(work: Path, gigabytes: float, sample: int) -> dict[str, Any]:
    layers = layers_for(gigabytes)
    say(f"writing {gigabytes} GB, {layers} layers")
    large, folded = made(work / "large", layers), work / "large-folded"
    start = time.perf_counter()
    flashnorm.fold_checkpoint(large, folded)
    fold_seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    small, small_folded = made(work / "small", SMALL_LAYERS), work / "small-folded"
    flashnorm.fold_checkpoint(small, small_folded)
    rows = []

    def add(what: str, *arguments: Any) -> None:
        say(what)
        rows.append(row(what, verified(*arguments)))
        say(json.dumps(rows[-1]))

    add("small, in memory", small, small_folded, False, sample)
    add("small, from disk", small, small_folded, True, sample)
    add("large, from disk", large, folded, True, sample)
    for path, count in ((small_folded, SMALL_LAYERS), (folded, layers)):
        spoil(path, WRONG.format(count // 2), 12345, 8.0)
    add("small with a wrong weight, in memory", small, small_folded, False, sample)
    add("small with a wrong weight, from disk", small, small_folded, True, sample)
    add("large with a wrong weight, from disk", large, folded, True, min(sample, 64))
    return {
        "machine": line(describe()),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "checkpoint_gb": size / 1e9,
        "float64_gb": size * 4 / 1e9,
        "layers": layers,
        "fold_seconds": fold_seconds,
        "wrong": [WRONG.format(count // 2) for count in (SMALL_LAYERS, layers)],
        "rows": rows,
    }


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(found: dict[str, Any]) -> str:
    head = (
        f"{found['machine']}, {found['memory_gb']:.0f} GB of memory. "
        f"The large checkpoint has {found['checkpoint_gb']:.1f} GB in bfloat16 "
        f"({found['layers']} layers), {found['float64_gb']:.0f} GB in float64.\n\n"
        "| | same | float64 error | bound | first wrong module | wrong weight | seconds | peak "
        "memory, GB |\n|---|---|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {r['what']} | {'yes' if r['ok'] else 'no'} | {r['float64_error']:.1e} | "
        f"{r['float64_bound']:.1e} | {r['first_wrong'] or ''} | {cell(r['wrong_weight'])} | "
        f"{r['seconds']:.0f} | "
        f"{r['peak_gb']:.1f} |"
        for r in found["rows"]
    ]
    return head + "\n".join(lines) + "\n"


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=21.0)
    parser.add_argument("--sample", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    work = args.workdir / "larger-than-memory"
    work.mkdir(parents=True)
    try:
        found = measured(work, args.gigabytes, args.sample)
    finally:
        shutil.rmtree(work)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
