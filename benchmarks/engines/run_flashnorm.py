"""A variant of flashnorm's own benchmark (eager, flashnorm, ...) as an engine."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers

import flashnorm
from benchmarks.engines.protocol import serve
from flashnorm.bench.models import DTYPES, open_model
from flashnorm.bench.records import VARIANTS
from flashnorm.bench.timing import stopwatch
from flashnorm.bench.variants import build, many_compilations


class Ours:
    def __init__(self, variant: str, model: str, dtype: str) -> None:
        self.name = variant
        self.variant = build(variant, open_model(model, dtype))

    def about(self) -> dict[str, Any]:
        return {
            "engine": f"{self.name}: transformers {transformers.__version__}, "
            f"torch {torch.__version__}, flashnorm {flashnorm.__version__}",
            "note": "decoding through generate()",
        }

    def decode(self, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        seconds, written = self.variant.generate(torch.tensor(prompt), tokens)
        return seconds, written.tolist()

    def prefill(self, ids: list[int]) -> float:
        given = torch.tensor(ids)
        return stopwatch(lambda: self.variant.prefill(given))()

    def margins(self, prompt: list[int], tokens: list[int]) -> list[float]:
        rows = self.variant.forced(torch.tensor(prompt), torch.tensor(tokens))
        best = rows.double().topk(2).values
        return (best[:, 0] - best[:, 1]).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="not used: it grows")
    parser.add_argument("--dtype", choices=list(DTYPES), required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.no_grad(), many_compilations():
        serve(Ours(given.variant, given.model, given.dtype))
