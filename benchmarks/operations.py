"""How fast norm + linear is on this CPU, against the memory and against torch, shape by shape.

For every shape, dtype and number of rows: our operation, `F.rms_norm` + `F.linear`, a weighted norm
in one pass + F.linear, both under torch.compile, and F.linear alone (what a norm that costs nothing
would leave), interleaved in one run, on copies of the weights that together exceed the caches;
medians. The read bandwidth is measured in the same rounds, by a
loop of our own that prefetches and does nothing else. With several instruction sets our kernels run
on each of them in turn, and torch on its own. Each row is checked against the float64 reference
before it is timed. Writes JSON and Markdown beside each other. Leave the cores alone.

    python benchmarks/operations.py --threads 2 --rounds 15 --out benchmarks/results/operations
    python benchmarks/operations.py --isa avx512bf16 avx512 avx2 --rows 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.bench import machine
from flashnorm.bench.timing import interleaved
from flashnorm.kernels import norms, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.kernels.cpu import policy
from flashnorm.kernels.cpu.library import Library, load

SHAPES = ((576, 960), (576, 3072), (2048, 3072), (2048, 16384), (4096, 6144), (4096, 28672))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
EPS = 1e-5
BYTES = 300_000_000  # of weights that one timing of a way reads with few rows
CONTROLS = ("eager", "fused", "compiled")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--isa", nargs="+", help="of our kernels; the best one if left")
    parser.add_argument("--cache", type=int, default=machine.cache_bytes(), help="bytes to exceed")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    return parser.parse_args()


class Rotation:
    """Weights whose copies together are twice the cache, so that each comes from memory."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, cache: int) -> None:
        one = torch.randn(k, n, dtype=dtype) / n**0.5
        self.bytes = one.numel() * one.element_size()
        self.copies = [one.clone() for _ in range(max(2, -(-2 * cache // self.bytes)))]
        self.at = 0

    def next(self) -> int:
        self.at = (self.at + 1) % len(self.copies)
        return self.at


def worst_error(x: Tensor, weight: Tensor, gain: Tensor, found: Tensor) -> float:
    call = Call(x.double(), (weight.double(),), None, norms.RMS, EPS, gain.double())
    expected = reference.norm_linear(call)[0]
    return float((found.double() - expected).norm() / expected.norm())


@torch.compile(dynamic=True)
def compiled(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, x.shape[-1:], gain, EPS), weight)


def prepared(calls: list[Call]) -> Callable[[int], list[Tensor]]:
    """The operation on the i-th weight, packed once, as an accelerated module calls it."""
    x, width = calls[0].x, [calls[0].weights[0].shape[0]]
    packed = [cpu.pack(call) for call in calls]

    def run(i: int) -> list[Tensor]:
        if x.shape[0] > policy.most_rows(calls[0]):
            return cpu.run(calls[i])
        return cpu.run_packed(packed[i], x, width, None)

    return run


def timed(run: Callable[[], Any], calls: int) -> Callable[[], float]:
    def seconds() -> float:
        for _ in range(1 + calls // 4):  # wakes its threads, and lets those of the way before sleep
            run()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return seconds


def on(isa: str, library: Library, run: Callable[[], float]) -> Callable[[], float]:
    def seconds() -> float:
        library.isa = isa
        return run()

    return seconds


def measure(
    library: Library, isas: list[str], turn: Rotation, rows: int, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    k, n = turn.copies[0].shape
    gain, x = torch.rand(n, dtype=dtype) + 0.5, torch.randn(rows, n, dtype=dtype)
    bound = [Call(x, (w,), eps=EPS, gain=gain) for w in turn.copies]
    ours = prepared(bound)
    eager = F.linear(F.rms_norm(x, (n,), gain, EPS), turn.copies[0])
    eager_error = worst_error(x, turn.copies[0], gain, eager)
    errors_of = {}
    for isa in isas:
        library.isa = isa
        errors_of[isa] = error = worst_error(x, turn.copies[0], gain, ours(0)[0])
        assert error <= 1.1 * eager_error + 1e-6, f"{isa} {n}x{k}, {rows}: {error}, {eager_error}"
    normed = F.rms_norm(x, (n,), gain, EPS)

    def read() -> None:
        library.read(turn.copies[turn.next()].data_ptr(), turn.bytes, torch.get_num_threads())

    alone = cpu.pack(Call(x, (), eps=EPS, gain=gain))
    z = torch.empty_like(x)
    runs: dict[str, Callable[[], Any]] = {
        "eager": lambda: F.linear(F.rms_norm(x, (n,), gain, EPS), turn.copies[turn.next()]),
        "fused": lambda: F.linear(cpu.normalize_packed(alone, x, z), turn.copies[turn.next()]),
        "compiled": lambda: compiled(x, gain, turn.copies[turn.next()]),
        "linear": lambda: F.linear(normed, turn.copies[turn.next()]),
        "read": read,
    }
    calls = max(1, BYTES // (turn.bytes * max(1, rows // 4)))
    clocks = {name: timed(run, calls) for name, run in runs.items()}
    for isa in isas:
        clocks[isa] = on(isa, library, timed(lambda: ours(turn.next()), calls))
    timings, errors = interleaved(clocks, rounds)
    assert not errors, errors
    median = {name: timing.median for name, timing in timings.items()}
    return {
        "n": n,
        "k": k,
        "rows": rows,
        "microseconds": {name: value * 1e6 for name, value in median.items()},
        "gigabytes_per_second": {name: turn.bytes / value / 1e9 for name, value in median.items()},
        "speedup": {isa: median["eager"] / median[isa] for isa in isas},
        "speedup_over_best": {
            isa: min(median[name] for name in CONTROLS) / median[isa] for isa in isas
        },
        "of_read_bandwidth": {isa: median["read"] / median[isa] for isa in isas},
        "error": errors_of,
        "eager_error": eager_error,
    }


def table(rows: list[dict[str, Any]], dtype: str, isas: list[str]) -> list[str]:
    """`over the best` is against the fastest of the three controls; `of read` of its bandwidth."""
    names = ["n→k", "rows", "rms_norm + linear µs", "fused norm + linear µs", "compiled µs"]
    names += ["linear µs", "read GB/s"]
    for isa in isas:
        names += [f"{isa} µs", "over the best", "of read"]
    lines = [f"\n{dtype}\n", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        us, speed = row["microseconds"], row["gigabytes_per_second"]
        cells = [f"{row['n']}→{row['k']}", str(row["rows"])]
        cells += [f"{us[name]:.1f}" for name in (*CONTROLS, "linear")] + [f"{speed['read']:.1f}"]
        for isa in isas:
            cells += [f"{us[isa]:.1f}", f"{row['speedup_over_best'][isa]:.2f}"]
            cells += [f"{row['of_read_bandwidth'][isa]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    library = load()
    if isinstance(library, str):
        raise SystemExit(library)
    isas = args.isa or [library.isa]
    found: dict[str, Any] = {
        "machine": machine.line(machine.describe()),
        "rounds": args.rounds,
        "rows": {},
    }
    lines = [f"Machine: {found['machine']}; medians of {args.rounds} interleaved rounds."]
    with torch.no_grad():
        for name in args.dtypes:
            found["rows"][name] = []
            for n, k in (map(int, shape.split("x")) for shape in args.shapes):
                turn = Rotation(n, k, DTYPES[name], args.cache)
                found["rows"][name] += [
                    measure(library, isas, turn, rows, DTYPES[name], args.rounds)
                    for rows in args.rows
                ]
            lines += table(found["rows"][name], name, isas)
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
