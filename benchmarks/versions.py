"""Prefill and decoding with two versions of flashnorm in turn: what a change costs, or saves.

    python -m benchmarks.versions DIR_BEFORE DIR_AFTER MODEL --dtype bf16 --rounds 15

DIR_* are checkouts with their kernels built. Each version is a process of its own that loads MODEL
and accelerates it; every round lets one decode and then the other, the first of them changing from
round to round. Prints medians of a prompt of `--context` tokens and per new token, their ratios,
and whether both gave the same tokens and the same bits for the prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

PREFILL, DECODE = "prefill", "token"
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


def worker(model_name: str, dtype: str, context: int, tokens: int) -> None:
    """Decode once for every line on stdin; write seconds, the tokens and a digest of the logits."""
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
            begun = time.perf_counter()
            out = model(ids, use_cache=True)
            prefill = time.perf_counter() - begun
            digest = hashlib.sha256(out.logits.double().numpy().tobytes()).hexdigest()
            cache, token, found = out.past_key_values, out.logits[:, -1:].argmax(-1), []
            start = time.perf_counter()
            for _ in range(tokens):
                found.append(int(token))
                out = model(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            took = (time.perf_counter() - start) / tokens
        row = {DECODE: took, PREFILL: prefill, "tokens": found, "digest": digest}
        print(json.dumps(row), flush=True)


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
    times: dict[str, list[list[float]]] = {PREFILL: [[], []], DECODE: [[], []]}
    same = {"tokens": True, "digest": True}
    for number in range(asked.rounds + 1):
        order = (0, 1) if number % 2 else (1, 0)
        found = {which: versions[which].decode() for which in order}
        same = {what: held and found[0][what] == found[1][what] for what, held in same.items()}
        for which in order if number else ():  # the first round warms up
            for what, held in times.items():
                held[which].append(found[which][what] * 1e3)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {asked.dtype}")
    for what, held in times.items():
        _say(f"{what} of {asked.context}" if what == PREFILL else what, held, versions)
    print(f"the same tokens in every round: {same['tokens']}")
    print(f"the same bits for the prompt in every round: {same['digest']}")


def _say(what: str, times: list[list[float]], versions: list[Version]) -> None:
    medians = [statistics.median(held) for held in times]
    for version, median in zip(versions, medians, strict=True):
        print(f"{median:9.3f} ms  {what}  {version.file}")
    pairs = statistics.median(b / a for a, b in zip(*times, strict=True))
    print(f"after / before: {medians[1] / medians[0]:.4f} (medians), {pairs:.4f} (pairs)")


if __name__ == "__main__":
    main()
