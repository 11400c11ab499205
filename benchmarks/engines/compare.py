"""transformers, flashnorm, llama.cpp and OpenVINO on the same weights in the same dtype, in turn.

Every engine is a process that waits until it is asked, so that no two run at once; medians of
interleaved rounds, the first of which warms up. How many of the first greedy tokens are those of
the first engine is reported, and fails nothing: see benchmarks/README.md.

    python -m benchmarks.engines.compare --model DIR --gguf 'DIR/smollm2-{dtype}.gguf' \\
        --llama-cpp ../peers/llama/bin/python --openvino ../peers/openvino/bin/python
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flashnorm.bench import machine
from flashnorm.bench.engines.children import KINDS, Child, command, our_command
from flashnorm.bench.models import DTYPES, open_model, token_ids


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="for transformers: a directory")
    parser.add_argument("--gguf", help="for the others: a file; {dtype} stands for the dtype")
    parser.add_argument("--variants", nargs="+", default=["eager", "flashnorm"])
    parser.add_argument("--llama-cpp", help="the python that has llama-cpp-python")
    parser.add_argument("--openvino", help="the python that has openvino-genai")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--prefill", type=int, nargs="*", default=[1, 16, 64, 512, 2048])
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    given = parser.parse_args()
    if (given.llama_cpp or given.openvino) and not given.gguf:
        parser.error("llama.cpp and OpenVINO need --gguf")
    return given


def commands(args: argparse.Namespace, dtype: str) -> dict[str, list[str]]:
    """How to start every engine that was asked for."""
    room = 64 + max([args.context + args.tokens, *args.prefill])
    model = str(Path(args.model).resolve())
    found = {name: our_command(name, model, dtype, args.threads) for name in args.variants}
    for name, python in (("llama.cpp", args.llama_cpp), ("openvino", args.openvino)):
        if python:
            kind = KINDS[name]
            file = _gguf(args, kind.only or dtype)
            found[name] = command(_absolute(python), kind.script, file, dtype, args.threads, room)
    return found


def _gguf(args: argparse.Namespace, dtype: str) -> str:
    return str(Path(args.gguf.replace("{dtype}", dtype)).expanduser().resolve())


def _absolute(python: str) -> str:
    """Not resolved: the link of a virtual environment is what makes it one."""
    return str(Path(python).expanduser().absolute())


class Comparison:
    """The engines of one dtype. One that fails is left out from then on, with its error."""

    def __init__(self, args: argparse.Namespace, dtype: str, ids: list[int], logs: Path) -> None:
        self.args, self.ids = args, ids
        self.errors: dict[str, str] = {}
        self.about: dict[str, Any] = {}
        self.asked: Counter[str] = Counter()
        self.children = [
            Child(name, command, logs / f"{dtype}-{name.replace('/', '-')}.log")
            for name, command in commands(args, dtype).items()
        ]

    def run(self) -> dict[str, Any]:
        try:
            self._each(self.children, self._introduce)
            texts: dict[str, list[int]] = {}
            decode = self._rounds(lambda child: self._decode(child, texts))
            margins = self._margins(texts)
            prefill = {
                count: self._rounds(lambda child, count=count: self._prefill(child, count))
                for count in self.args.prefill
            }
        finally:
            for child in self.children:
                child.close()
        return {
            "engines": self.about,
            "decode": decode,
            "prefill": prefill,
            "equal_tokens": agreement(texts, margins),
            "errors": self.errors,
        }

    def _introduce(self, child: Child) -> float:
        self.about[child.name] = child.ask("about")
        return 0.0

    def _decode(self, child: Child, texts: dict[str, list[int]]) -> float:
        asked = {"prompt": self.ids[: self.args.context], "tokens": self.args.tokens}
        found = child.ask("decode", **asked)
        texts[child.name] = found["tokens"]
        return float(found["seconds"])

    def _margins(self, texts: dict[str, list[int]]) -> list[float]:
        """Of the first engine: how far its two best tokens were apart, at each that it wrote."""
        first = self.children[0]
        if first.name not in texts or first.name not in self.args.variants:
            return []
        prompt = self.ids[: self.args.context]
        margins = first.ask("margins", prompt=prompt, tokens=texts[first.name])["margins"]
        return [float(each) for each in margins]

    def _prefill(self, child: Child, count: int) -> float:
        """Another text each time: some engines keep the cache of a beginning that they know."""
        start = self.asked[child.name] = self.asked[child.name] + 1
        ids = (self.ids[start:] + self.ids)[:count]
        return float(child.ask("prefill", ids=ids)["seconds"])

    def _rounds(self, measure: Callable[[Child], float]) -> dict[str, dict[str, float]]:
        seconds: dict[str, list[float]] = {}
        for number in range(self.args.rounds + 1):
            turn = number % max(1, len(self.children))
            for name, took in self._each(
                self.children[turn:] + self.children[:turn], measure
            ).items():
                if number:
                    seconds.setdefault(name, []).append(took * 1e3)
        return {
            name: {"median": statistics.median(took), "lowest": min(took), "highest": max(took)}
            for name, took in seconds.items()
            if name not in self.errors
        }

    def _each(self, children: list[Child], measure: Callable[[Child], float]) -> dict[str, float]:
        found = {}
        for child in children:
            if child.name in self.errors:
                continue
            try:
                found[child.name] = measure(child)
            except Exception as error:
                self.errors[child.name] = str(error)
        return found


def agreement(texts: dict[str, list[int]], margins: list[float]) -> dict[str, str]:
    """How many greedy tokens of each engine are those of the first, from the beginning.

    Where one differs, the margin of the first engine there: none at a tie, which rounding decides.
    """
    first = next(iter(texts.values()), [])
    found = {}
    for name, text in texts.items():
        same = [a == b for a, b in zip(text, first, strict=False)]
        equal = [*same, False].index(False)
        margin = f", margin {margins[equal]:.3f}" if equal < len(margins) else ""
        found[name] = f"{equal} of {len(first)}{margin}"
    return found


def table(found: dict[str, Any]) -> list[str]:
    """One row per engine, decoding and every length; ms, with the lowest and the highest."""
    counts = list(found["prefill"])
    header = ["engine", "decode ms/token", *(f"prefill {n}, ms" for n in counts), "tokens equal"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in found["engines"]:
        columns = [found["decode"], *found["prefill"].values()]
        cells = [_cell(column.get(name)) for column in columns]
        lines.append(f"| {' | '.join([name, *cells, found['equal_tokens'].get(name, '–')])} |")
    about = [f"- {name}: {it['engine']}; {it['note']}" for name, it in found["engines"].items()]
    failed = [f"- {name} failed: {error}" for name, error in found["errors"].items()]
    return [*lines, "", *about, *failed]


def _cell(took: dict[str, float] | None) -> str:
    if took is None:
        return "–"
    return f"{took['median']:.2f} ({took['lowest']:.2f}-{took['highest']:.2f})"


def prompt_ids(args: argparse.Namespace) -> list[int]:
    """Tokens of the shipped text (random ones without a tokenizer), the same for every engine."""
    model = open_model(args.model, args.dtypes[0])
    count = max([args.context, *args.prefill])
    return token_ids(args.model, model, count).tolist()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    where = machine.describe()
    ids = prompt_ids(args)
    result: dict[str, Any] = {"machine": where, "model": Path(args.model).name, "dtypes": {}}
    lines = [
        f"# {Path(args.model).name}: engines",
        "",
        f"Machine: {machine.line(where)}.",
        "",
        f"{args.tokens} tokens decoded after {args.context}; medians of {args.rounds} interleaved "
        "rounds.",
    ]
    with tempfile.TemporaryDirectory() as logs:
        for dtype in args.dtypes:
            found = Comparison(args, dtype, ids, Path(logs)).run()
            result["dtypes"][dtype] = found
            lines += ["", f"## {dtype}", "", *table(found)]
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        base = args.out.name
        args.out.with_name(f"{base}.json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_name(f"{base}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
