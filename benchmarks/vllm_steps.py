"""Steps of vLLM on a CPU with and without our kernels, in turn: milliseconds, tokens per second.

    python -m benchmarks.vllm_steps DIR --dtype bfloat16 --out benchmarks/results/vllm-$(date +%F)

Two engines are up, and one is asked at a time: both fold while loading, one runs on kernels of ours
(`{"kernels": true}`). A round generates from some prompts at once, once many tokens and once one:
the difference is the steps. Medians of interleaved rounds, the first of which warms up. Beside them
stands how far greedy texts go with those of float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashnorm.bench import machine

ENGINES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "ours": {"model_loader_extra_config": {"kernels": True}},
}


@dataclass
class Row:
    """So many sequences at once: ms of a step in each round, how far texts go with float32's."""

    batch: int
    vllm: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    like_vllm: float = 0
    like_ours: float = 0

    def line(self) -> str:
        vllm, ours = statistics.median(self.vllm), statistics.median(self.ours)
        rates = [f"{ms:.2f} | {1e3 * self.batch / ms:.1f}" for ms in (vllm, ours)]
        low, high = min(self.ours), max(self.ours)
        like = f"{self.like_vllm:.1f} | {self.like_ours:.1f}"
        spread = f"{low:.2f} to {high:.2f} | {vllm / ours:.2f}x"
        return f"| {self.batch} | {rates[0]} | {rates[1]} | {spread} | {like} |"


class Engine:
    """One vLLM in a process of its own, asked in JSON."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        self.about = self._answer()

    def ask(self, batch: int, tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens of each sequence."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps([batch, tokens]) + "\n")
        self._child.stdin.flush()
        found = self._answer()
        return found["seconds"], found["tokens"]

    def step(self, batch: int, tokens: int) -> tuple[float, list[list[int]]]:
        """Milliseconds of a step of so many sequences, and their tokens."""
        first, _ = self.ask(batch, 1)
        whole, found = self.ask(batch, tokens)
        return 1e3 * (whole - first) / (tokens - 1), found

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith('{"'):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit("vLLM ended: see what it said above")


@contextmanager
def engine(model: Path, dtype: str, options: dict[str, Any]) -> Iterator[Engine]:
    """A vLLM that is up."""
    asked = {"model": str(model), "dtype": dtype, "load_format": "flashnorm", **options}
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.vllm_steps", "--engine", json.dumps(asked)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    try:
        yield Engine(child)
    finally:
        child.kill()
        child.wait()


def serve(asked: dict[str, Any]) -> None:
    """The engine's side: a line for each question."""
    from vllm import LLM, SamplingParams, __version__

    llm = LLM(max_model_len=256, seed=0, disable_log_stats=True, **asked)
    print(json.dumps({"version": __version__, "mb": _resident()}), flush=True)
    for line in sys.stdin:
        batch, tokens = json.loads(line)
        prompts: Any = [{"prompt_token_ids": [5 + i, *range(100, 107)]} for i in range(batch)]
        options = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)
        start = time.perf_counter()
        outputs = llm.generate(prompts, options, use_tqdm=False)
        seconds = time.perf_counter() - start
        found = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"seconds": seconds, "tokens": found}), flush=True)


def _resident() -> int:
    """Resident memory of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1000
    return 0


def alike(found: list[list[int]], truth: list[list[int]]) -> float:
    """How many tokens are the same until the first that is not; the mean of all sequences."""
    counts = []
    for tokens, exact in zip(found, truth, strict=True):
        same = [a == b for a, b in zip(tokens, exact, strict=True)]
        counts.append(same.index(False) if False in same else len(same))
    return statistics.mean(counts)


def measure(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Both engines up; a row for each number of sequences."""
    rows = [Row(batch) for batch in args.batch]
    with engine(args.model, "float32", {}) as exact:
        truth = {row.batch: exact.ask(row.batch, args.tokens)[1] for row in rows}
    with ExitStack() as up:
        engines = {
            name: up.enter_context(engine(args.model, args.dtype, options))
            for name, options in ENGINES.items()
        }
        for number in range(args.rounds + 1):
            for row in rows:
                for name in engines if number % 2 else reversed(engines):
                    ms, found = engines[name].step(row.batch, args.tokens)
                    setattr(row, f"like_{name}", alike(found, truth[row.batch]))
                    if number:
                        getattr(row, name).append(ms)
        return rows, {name: each.about for name, each in engines.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="the directory of a checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16], help="sequences")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--engine", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.engine:
        return serve(args.engine)
    rows, engines = measure(args)
    about = machine.describe()
    memory = " and ".join(f"{engines[name]['mb']} MB" for name in ENGINES)
    lines = [
        f"vLLM {engines['vllm']['version']}, {args.model.name}, {args.dtype}, {args.tokens} "
        f"tokens; medians of {args.rounds} interleaved rounds; resident without and with our "
        f"kernels: {memory}, of which 1 GiB caches. {machine.line(about)}",
        "",
        "| sequences | vLLM: ms a step | tokens/s | with our kernels | tokens/s "
        "| lowest to highest | ratio | tokens like float32's, vLLM | ours |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row.line() for row in rows),
    ]
    print("\n".join(lines))
    if args.out:
        data = {"machine": about, "engines": engines, "rows": [asdict(row) for row in rows]}
        Path(f"{args.out}.json").write_text(json.dumps(data, indent=2) + "\n")
        Path(f"{args.out}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
