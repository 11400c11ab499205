"""How far logits with quantized weights are from those of the dequantized model in float64.

    python -m benchmarks.quantized_errors --gguf Q8_0=FILE Q4_0=FILE \\
        --llama-cpp ../peers/llama/bin/python --out benchmarks/results/quantized-errors-$(date +%F)

The model in float64 continues a prompt greedily; every engine decodes the same tokens, one by one,
and its logits before each are compared: ‖Δ‖ / ‖truth‖ over all of them, the largest |Δ|, and how
many of the tokens it would have chosen. llama.cpp rounds activations to eight bits, ours do not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flashnorm
from benchmarks.quantized import absolute
from flashnorm.bench import machine
from flashnorm.bench.engines.children import KINDS, Child, command, our_command
from flashnorm.bench.models import token_ids

OURS = ("fp32", "bf16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", nargs="+", required=True, help="NAME=FILE")
    parser.add_argument("--tokenizer", required=True, help="a directory that reads the prompt")
    parser.add_argument("--llama-cpp", help="the python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    return parser.parse_args()


@torch.no_grad()
def truth(file: Path, tokenizer: str, args: argparse.Namespace) -> tuple[list[int], Any, Any]:
    """(the prompt, the greedy tokens [S], the logits before each [S, V]), in float64."""
    model: Any = flashnorm.dequantize_(flashnorm.load_gguf(file)).double()
    prompt = token_ids(tokenizer, model, args.context)
    ids, cache = prompt[None], None
    tokens, rows = [], []
    for _ in range(args.tokens):
        found = model(ids, past_key_values=cache, use_cache=True)
        cache, last = found.past_key_values, found.logits[0, -1]
        rows.append(last.numpy())
        tokens.append(int(last.argmax()))
        ids = last.argmax().reshape(1, 1)
    return prompt.tolist(), tokens, np.stack(rows)


def engines(name: str, file: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """How the processes are started whose logits are compared."""
    room, path = args.context + args.tokens, str(file)
    how = {"packed": True, "loop": True, "tokens": room}
    found = {
        f"flashnorm+package, {dtype}": our_command(
            "flashnorm+package", path, dtype, args.threads, **how
        )
        for dtype in OURS
    }
    if args.llama_cpp:
        script = KINDS["llama.cpp"].script
        python = absolute(args.llama_cpp)
        found["llama.cpp"] = command(python, script, path, name, args.threads, room)
    return found


def compared(
    start: list[str], prompt: list[int], tokens: list[int], exact: Any, folder: Path
) -> dict[str, float]:
    """The errors of one engine."""
    child, to = Child("engine", start, folder / "log"), folder / "logits.npy"
    try:
        child.ask("logits", prompt=prompt, tokens=tokens, to=str(to))
    finally:
        child.close()
    found = np.load(to).astype(np.float64)
    off = found - exact
    return {
        "relative": float(np.linalg.norm(off) / np.linalg.norm(exact)),
        "largest": float(np.abs(off).max()),
        "same": int((found.argmax(-1) == np.array(tokens)).sum()),
    }


def main() -> None:
    args, where = arguments(), machine.describe()
    torch.set_num_threads(args.threads)
    lines = [
        "# Logits with quantized weights against the dequantized model in float64",
        "",
        f"Machine: {machine.line(where)}.",
        "",
        f"{args.tokens} tokens after {args.context}, decoded one by one.",
        "",
        "| file | system | ‖Δ‖ / ‖truth‖ | largest difference | same greedy token |",
        "|---|---|---|---|---|",
    ]
    results = []
    for given in args.gguf:
        name, _, path = given.partition("=")
        file = Path(path).resolve()
        prompt, tokens, exact = truth(file, args.tokenizer, args)
        for system, start in engines(name, file, args).items():
            with tempfile.TemporaryDirectory() as folder:
                errors = compared(start, prompt, tokens, exact, Path(folder))
            results.append({"file": name, "system": system, **errors})
            lines.append(
                f"| {name} | {system} | {errors['relative']:.1e} | {errors['largest']:.1e} | "
                f"{errors['same']} of {len(tokens)} |"
            )
            print(lines[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": where, "results": results}
        args.out.with_name(args.out.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_name(args.out.name + ".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
