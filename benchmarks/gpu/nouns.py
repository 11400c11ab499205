"""What a run of the GPU benchmark is asked for, and what its stages share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.store import Store

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """norm(x) Wᵀ with x [.., n] and W [k, n]; with `glu` W is a gate half and an up half."""

    n: int
    k: int
    glu: bool = False

    def __str__(self) -> str:
        return f"{self.n}→{self.k}{' GLU' if self.glu else ''}"


@dataclass(frozen=True)
class Settings:
    """What to measure. `dry` is a run on the CPU with tiny shapes: its times mean nothing."""

    out: Path
    device: str = "cuda"
    minutes: float = 8.0
    rounds: int = 15
    tune: bool = False
    dry: bool = False
    stages: tuple[str, ...] = ()
    models: tuple[str, ...] = ("llama-3.2-1b", "mistral-7b")


@dataclass
class Run:
    """A run under way: `ceiling` (GB/s, TFLOP/s) is measured by the stage `environment`."""

    settings: Settings
    store: Store
    budget: Budget
    ceiling: dict[str, float] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"[{self.budget.left():5.0f} s left] {text}", flush=True)
