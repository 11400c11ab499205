"""What a run of the GPU benchmark is asked for, and what its stages share."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.store import Row, Store

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CEILINGS = "ceilings"
UNKNOWN = {"bytes": float("nan"), "operations": float("nan")}


@dataclass(frozen=True)
class Shape:
    """norm(x) Wᵀ with x [.., n] and W [k, n]; with `glu` W is a gate half and an up half."""

    n: int
    k: int
    glu: bool = False

    def __str__(self) -> str:
        return f"{self.n}→{self.k}{' GLU' if self.glu else ''}"

    def tiny(self) -> Shape:
        """The shape that stands for this one in a dry run."""
        return Shape(-(-self.n // 1024) * 16, -(-self.k // 1024) * 16, self.glu)


@dataclass(frozen=True)
class Settings:
    """What to measure. `dry` is a run on the CPU with tiny shapes: its times mean nothing."""

    work: Path
    device: str = "cuda"
    seconds: float = 540.0
    rounds: int = 15
    tune: bool = False
    dry: bool = False
    stages: tuple[str, ...] = ()
    models: tuple[str, ...] = ("llama-3.2-1b", "mistral-7b")


@dataclass
class Run:
    """A run under way. `kept` is what pieces leave for later ones: a model, prepared inputs."""

    settings: Settings
    store: Store
    budget: Budget
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def ceiling(self) -> Row:
        """Bytes and operations per second, once they are measured."""
        return self.store.find(CEILINGS) or UNKNOWN

    def say(self, text: str) -> None:
        line = f"[{self.budget.left():5.0f} s left] {text}"
        print(line, flush=True)
        self.store.log(line)


@dataclass(frozen=True)
class Piece:
    """One row of a stage of the store, under a key, and the seconds that a card takes for it."""

    stage: str
    key: Row
    seconds: float
    measure: Callable[[], Row]

    def __str__(self) -> str:
        return ", ".join([self.stage, *(str(value) for value in self.key.values())])


@dataclass(frozen=True)
class Stage:
    """Pieces that answer one question, and the seconds that they may take together."""

    name: str
    seconds: float
    answers: str
    pieces: Callable[[Run], Generator[Piece, None, None]]
