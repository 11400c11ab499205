"""`transformers serve` with and without `flashnorm run`, in turn: requests and tokens per second.

    python -m benchmarks.serve DIR --at-once 1 4 --out benchmarks/results/serve-$(date +%F)

Two servers are up, and one is asked at a time; medians of interleaved rounds, the first of which
warms up. In every round the texts of both are compared: a greedy text may part where two tokens are
as likely as each other but for rounding, so the number of requests with equal texts stands beside
the figures. Each request is a prompt of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flashnorm.bench import machine
from tests.engines.serving import complete, server

RUN = (sys.executable, "-m", "flashnorm", "run", "--")
PROMPT = "The norm of a vector is read before it is asked how long the vector is"


@dataclass
class Row:
    """So many requests at once: seconds of each round, tokens of one, and equal texts."""

    at_once: int
    batches: bool
    plain: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    tokens: int = 0
    equal: int = 0
    asked: int = 0

    def line(self) -> str:
        plain, ours = statistics.median(self.plain), statistics.median(self.ours)
        how = "in batches" if self.batches else "one by one"
        rates = [f"{self.at_once / s:.2f} | {self.tokens / s:.1f}" for s in (plain, ours)]
        same = f"{self.equal} of {self.asked}"
        return f"| {self.at_once}, {how} | {rates[0]} | {rates[1]} | {plain / ours:.2f}x | {same} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the directory of a checkpoint and its tokenizer")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4], help="requests")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=256, help="of the cache of batches")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    return parser.parse_args()


def ask(
    address: str, model: Path, at_once: int, tokens: int
) -> tuple[float, list[tuple[str, int]]]:
    """Seconds until all of so many requests are answered, and their texts and lengths."""
    prompts = [f"{number}. {PROMPT}" for number in range(at_once)]
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda prompt: complete(address, model, prompt, tokens), prompts))
    return time.perf_counter() - start, found


def measure(args: argparse.Namespace, batches: bool) -> list[Row]:
    """Both servers up; a row for each number of requests."""
    options = ["--dtype", args.dtype]
    if batches:
        options += ["--continuous-batching", "--cb-num-blocks", str(args.blocks)]
    rows = [Row(at_once, batches) for at_once in args.at_once]
    with ExitStack() as up:
        servers = {
            name: up.enter_context(server(args.model, *options, under=under))
            for name, under in (("plain", ()), ("ours", RUN))
        }
        for number in range(args.rounds + 1):
            for row in rows:
                texts = {}
                for name in servers if number % 2 else reversed(servers):
                    seconds, texts[name] = ask(servers[name], args.model, row.at_once, args.tokens)
                    if number:
                        getattr(row, name).append(seconds)
                pairs = zip(texts["plain"], texts["ours"], strict=True)
                row.equal += sum(plain == ours for plain, ours in pairs)
                row.asked += row.at_once
                row.tokens = sum(tokens for _, tokens in texts["plain"])
    return rows


def main() -> None:
    args = arguments()
    args.model = args.model.resolve()
    rows = [row for batches in (False, True) for row in measure(args, batches)]
    about = machine.describe()
    lines = [
        f"{args.model.name}, up to {args.tokens} tokens a request, dtype {args.dtype}; medians of "
        f"{args.rounds} interleaved rounds. {machine.line(about)}",
        "",
        "| requests at once | requests/s | tokens/s | with flashnorm run: requests/s | tokens/s "
        "| ratio | equal texts |",
        "|---|---|---|---|---|---|---|",
        *(row.line() for row in rows),
    ]
    print("\n".join(lines))
    if args.out:
        data = {"machine": about, "tokens": args.tokens, "rows": [asdict(row) for row in rows]}
        Path(f"{args.out}.json").write_text(json.dumps(data, indent=2) + "\n")
        Path(f"{args.out}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
