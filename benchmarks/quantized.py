"""Models with quantized weights: ours on the file as it is, llama.cpp on the same file, in turn.

    python -m benchmarks.quantized --dense DIR --gguf Q8_0=FILE Q4_0=FILE Q4_K=FILE \\
        --llama-cpp ../peers/llama/bin/python --out benchmarks/results/quantized-$(date +%F)
    python -m benchmarks.quantized --dense DIR --torchao int8 int4 float8 --out ..

Every system is a process that waits until it is asked, so that no two run at once; medians of
interleaved rounds, the first of which warms up. Ours decode in a loop of forwards, as llama.cpp is
called. GB/s is the size of the file, or of the dense weights, for each token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashnorm.bench import machine
from flashnorm.bench.engines.children import KINDS, Child, command, our_command
from flashnorm.bench.models import open_model, token_ids
from flashnorm.bench.quantized import METHODS

VARIANTS = ("flashnorm", "flashnorm+package")


@dataclass
class System:
    """One row: what it is called, its process, what its weights take, and what it took."""

    name: str
    command: list[str]
    bytes: int
    versus: str = ""  # whose time its own is divided into
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    error: str = ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", required=True, help="a directory or config.json, run in bf16")
    parser.add_argument("--gguf", nargs="*", default=[], help="NAME=FILE")
    parser.add_argument("--torchao", nargs="*", default=[], choices=METHODS)
    parser.add_argument("--llama-cpp", help="the python that has llama-cpp-python")
    parser.add_argument("--dtype", default="fp32", help="of what is computed with a GGUF file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    return parser.parse_args()


def systems(args: argparse.Namespace) -> list[System]:
    room = args.context + args.tokens
    dense, how = str(Path(args.dense).resolve()), {"loop": True, "tokens": room}
    size = sum(p.nbytes for p in open_model(dense, "bf16").parameters())
    found = []
    for variant in VARIANTS:
        ours = our_command(variant, dense, "bf16", args.threads, **how)
        found.append(System(f"bf16, {variant}", ours, size))
    for given in args.gguf:
        name, _, file = given.partition("=")
        path = Path(file).resolve()
        size = path.stat().st_size
        for variant in VARIANTS:
            ours = our_command(variant, str(path), args.dtype, args.threads, packed=True, **how)
            found.append(System(f"{name}, {variant}", ours, size, f"bf16, {variant}"))
        if args.llama_cpp:
            script = KINDS["llama.cpp"].script
            theirs = command(absolute(args.llama_cpp), script, str(path), name, args.threads, room)
            found.append(System(f"{name}, llama.cpp", theirs, size, f"bf16, {VARIANTS[-1]}"))
    for method in args.torchao:
        for variant in ("eager", *VARIANTS):
            ours = our_command(variant, dense, "bf16", args.threads, quantize=method, **how)
            found.append(System(f"{method}, {variant}", ours, 0, f"{method}, eager"))
    return found


def absolute(python: str) -> str:
    """Not resolved: the link of a virtual environment is what makes it one."""
    return str(Path(python).expanduser().absolute())


def measure(rows: list[System], prompt: list[int], tokens: int, rounds: int, logs: Path) -> None:
    """Fill in what each took, in turn."""
    children = [Child(row.name, row.command, logs / f"{i}.log") for i, row in enumerate(rows)]
    try:
        for number in range(rounds + 1):
            turn = number % len(rows)
            for at in [*range(turn, len(rows)), *range(turn)]:
                if not rows[at].error:
                    _ask(rows[at], children[at], prompt, tokens, keep=number > 0)
    finally:
        for child in children:
            child.close()


def _ask(row: System, child: Child, prompt: list[int], tokens: int, keep: bool) -> None:
    try:
        found = child.ask("decode", prompt=prompt, tokens=tokens)
    except RuntimeError as error:
        row.error = str(error)
        return
    row.tokens = found["tokens"]
    if keep:
        row.seconds.append(found["seconds"])


def table(rows: list[System]) -> list[str]:
    medians = {row.name: statistics.median(row.seconds) for row in rows if row.seconds}
    lines = [
        "| system | ms per token | lowest to highest | times as fast | GB/s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.name not in medians:
            lines.append(f"| {row.name} | failed: {row.error} | | | |")
            continue
        took, base = medians[row.name], medians.get(row.versus)
        ratio = f"{base / took:.2f} of {row.versus}" if base else ""
        spread = f"{min(row.seconds) * 1e3:.2f} to {max(row.seconds) * 1e3:.2f}"
        read = f"{row.bytes / took / 1e9:.1f}" if row.bytes else ""
        lines.append(f"| {row.name} | {took * 1e3:.2f} | {spread} | {ratio} | {read} |")
    return lines


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    where = machine.describe()
    rows = systems(args)
    model = open_model(str(Path(args.dense).resolve()), "bf16")
    prompt = token_ids(args.dense, model, args.context).tolist()
    del model
    with tempfile.TemporaryDirectory() as logs:
        measure(rows, prompt, args.tokens, args.rounds, Path(logs))
    lines = [
        f"# {Path(args.dense).name}: quantized weights",
        "",
        f"Machine: {machine.line(where)}.",
        "",
        f"{args.tokens} tokens after {args.context}; medians of {args.rounds} interleaved rounds.",
        "",
        *table(rows),
    ]
    print("\n".join(lines))
    if args.out:
        found = [{"name": r.name, "ms": [s * 1e3 for s in r.seconds], "tokens": r.tokens,
                  "bytes": r.bytes, "error": r.error} for r in rows]  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": where, "model": Path(args.dense).name, "systems": found}
        args.out.with_name(args.out.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_name(args.out.name + ".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
