"""Decoding with two versions of flashnorm in turn: what a change costs, or saves.

    python -m benchmarks.versions DIR_BEFORE DIR_AFTER MODEL --dtype bf16 --rounds 15

DIR_* are checkouts with their kernels built. Each version is a process of its own that loads MODEL
and accelerates it; every round lets one decode and then the other, the first of them changing from
round to round. Prints medians per token, their ratio, and whether both wrote the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


def worker(model_name: str, dtype: str, context: int, tokens: int) -> None:
    """Decode once for every line on stdin; write seconds per token and the tokens."""
    import torch
    import transformers

    import flashnorm

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_name, dtype=getattr(torch, DTYPES[dtype])
    ).eval()
    flashnorm.accelerate_(model)
    ids = torch.randint(10, 1000, (1, context))
    print(json.dumps({"file": flashnorm.__file__}), flush=True)
    for _ in sys.stdin:
        with torch.no_grad():
            out = model(ids, use_cache=True)
            cache, token, found = out.past_key_values, out.logits[:, -1:].argmax(-1), []
            start = time.perf_counter()
            for _ in range(tokens):
                found.append(int(token))
                out = model(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            took = (time.perf_counter() - start) / tokens
        print(json.dumps({"seconds": took, "tokens": found}), flush=True)


class Version:
    """A checkout, and the process that decodes with it."""

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(directory.resolve())}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=directory
        )
        self.file = self._read()["file"]

    def _read(self) -> dict:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def decode(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="+", help="BEFORE AFTER MODEL")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.places[0], asked.dtype, asked.context, asked.tokens)
        return
    before, after, model = asked.places
    passed = [str(Path(model).resolve()), "--dtype", asked.dtype, "--tokens", str(asked.tokens)]
    versions = [
        Version(Path(p), [*passed, "--context", str(asked.context)]) for p in (before, after)
    ]
    times: list[list[float]] = [[], []]
    same = True
    for number in range(asked.rounds + 1):
        order = (0, 1) if number % 2 else (1, 0)
        found = {which: versions[which].decode() for which in order}
        same = same and found[0]["tokens"] == found[1]["tokens"]
        for which in order if number else ():  # the first round warms up
            times[which].append(found[which]["seconds"] * 1e3)
    pairs = [b / a for a, b in zip(*times, strict=True)]
    medians = [statistics.median(held) for held in times]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {asked.dtype}")
    for version, median in zip(versions, medians, strict=True):
        print(f"{median:8.3f} ms per token  {version.file}")
    ratio, paired = medians[1] / medians[0], statistics.median(pairs)
    print(f"after / before: {ratio:.4f} (medians), {paired:.4f} (pairs)")
    print(f"the same tokens in every round: {same}")


if __name__ == "__main__":
    main()
