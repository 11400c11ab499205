"""A variant of flashnorm's own benchmark (eager, flashnorm, ...) as an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

import flashnorm
from flashnorm.bench.models import open_model
from flashnorm.bench.quantized import quantize_
from flashnorm.bench.timing import stopwatch
from flashnorm.bench.variants import build, many_compilations


class Engine:
    """quantize: how linear layers are quantized first (`quantized.METHODS`); packed: whether a GGUF
    file's weights stay as they are; loop: decoding is a loop of forwards, and not generate()."""

    def __init__(self, variant: str, model: str, dtype: str, **how: Any) -> None:
        self.name, self.compilations = variant, many_compilations()
        self.compilations.__enter__()  # for as long as this process lives
        made = open_model(model, dtype, how.get("packed", False))
        if method := how.get("quantize"):
            quantize_(made, method)
        self.loop, tokens = how.get("loop", False), how.get("tokens", 1)
        self.variant = build(variant, made, tokens=tokens)

    def about(self) -> dict[str, Any]:
        return {
            "engine": f"{self.name}: transformers {transformers.__version__}, "
            f"torch {torch.__version__}, flashnorm {flashnorm.__version__}",
            "note": "decoding in a loop of forwards"
            if self.loop
            else "decoding through generate()",
        }

    def decode(self, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        seconds, written = self.variant.generate(torch.tensor(prompt), tokens)
        if self.loop:
            seconds = self.variant.loop(torch.tensor(prompt), tokens)
        return seconds, written.tolist()

    def prefill(self, ids: list[int]) -> float:
        given = torch.tensor(ids)
        return stopwatch(lambda: self.variant.prefill(given))()

    def margins(self, prompt: list[int], tokens: list[int]) -> list[float]:
        rows = self.variant.forced(torch.tensor(prompt), torch.tensor(tokens))
        best = rows.double().topk(2).values
        return (best[:, 0] - best[:, 1]).tolist()

    def logits(self, prompt: list[int], tokens: list[int], to: str) -> None:
        rows = self.variant.forced(torch.tensor(prompt), torch.tensor(tokens))
        np.save(to, rows.float().numpy())


def make(asked: dict[str, Any]) -> Engine:
    """Its cache grows: `room` is not asked for."""
    torch.set_num_threads(asked["threads"])
    torch.set_grad_enabled(False)
    how = {name: asked[name] for name in ("packed", "quantize", "loop", "tokens") if name in asked}
    return Engine(asked["variant"], asked["model"], asked["dtype"], **how)
