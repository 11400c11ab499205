"""What a benchmark is asked for, and what it finds: times in seconds, memory in bytes."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from flashnorm.paged import Paged

EAGER, COMPILE, OURS, OURS_COMPILED = "eager", "compile", "flashnorm", "flashnorm+compile"
PACKAGED = "flashnorm+package"
VARIANTS = (EAGER, COMPILE, OURS, OURS_COMPILED, PACKAGED)
CHECKS, DECODE, MEMORY = "correctness", "decode", "memory"  # groups of figures, with PREFILL
GENERATE, FORWARD, PREFILL = "decode, generate()", "decode, forward loop", "prefill"


@dataclass(frozen=True)
class Settings:
    """What to measure. `cache` in bytes: what the buffer for the read bandwidth has to exceed."""

    source: str
    dtypes: tuple[str, ...] = ("bf16",)
    threads: int = 1
    rounds: int = 5
    tokens: int = 32
    contexts: tuple[int, ...] = (64,)
    prefill: tuple[int, ...] = (16, 64, 512)
    variants: tuple[str, ...] = (EAGER, OURS)
    cache: int = 64 * 2**20
    memory: bool = False
    engines: tuple[str, ...] = ()  # names, or name=python where another environment has it
    gguf: str | None = (
        None  # what they read, where it is not `source`; {dtype} stands for the dtype
    )
    packed: bool = False  # `source` is a GGUF file whose weights stay as they are


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, a value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, float]:
        """Milliseconds."""
        return {
            "median": self.median * 1e3,
            "lowest": min(self.seconds) * 1e3,
            "highest": max(self.seconds) * 1e3,
            "rounds": len(self.seconds),
        }


@dataclass(frozen=True)
class Row:
    """The time of one variant: per token for decoding, per pass over `tokens` for prefill.

    `context` is how many tokens stand before the decoded ones. `speedup` is eager's time over this
    one (None without eager). For decoding, `gigabytes` is the rate at which weights were read in
    GB/s (None for other engines, whose files may be of another size), and `of_memory` and
    `of_weights` are its parts of the read bandwidths that were measured in the same rounds.
    """

    kind: str
    tokens: int
    variant: str
    timing: Timing
    speedup: float | None
    gigabytes: float | None = None
    of_memory: float | None = None
    of_weights: float | None = None
    context: int | None = None

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "timing"}
        return {**own, "milliseconds": self.timing.to_json()}


@dataclass(frozen=True)
class Check:
    """How near a variant is to eager, and to float64.

    `equal` of `tokens` greedy tokens equal eager's before the `first` that does not (None where all
    do), where eager's two largest logits are `margin` apart. The errors are ‖Δ‖ / ‖truth‖ of logits
    against eager in float64: of one pass over all tokens, and of tokens decoded one by one.
    """

    variant: str
    equal: int
    tokens: int
    first: int | None
    margin: float | None
    pass_error: float
    decode_error: float


@dataclass(frozen=True)
class Engine:
    """Another engine: what it says of itself, and the `equal` first of `tokens` greedy tokens that
    are eager's; `margin` as of a `Check`. What it computes is not held against float64."""

    name: str
    engine: str
    note: str
    file: str
    equal: int
    tokens: int
    margin: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes of one variant; None where it could not be measured.

    `peak_rss` and `resident` (at the end) are of a fresh process that loads and decodes;
    `prefill_rss` is by how much it grew in a pass over `tokens` afterwards. `activations` is the
    peak of what that pass allocated through torch.
    """

    variant: str
    tokens: int
    peak_rss: int | None = None
    resident: int | None = None
    prefill_rss: int | None = None
    activations: int | None = None


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth in GB/s: `memory` beyond all caches, `weights` over as much as the weights."""

    memory: float
    weights: float


@dataclass(frozen=True)
class Failure:
    """A variant that could not go on: at which `step`, and why."""

    variant: str
    step: str
    error: str


@dataclass(frozen=True)
class Measured:
    """Everything about one dtype. `token_bytes` of weights are read for every decoded token.

    `bandwidth` is of the rounds of the first context.
    """

    dtype: str
    parameter_bytes: int
    token_bytes: int
    checks: tuple[Check, ...]
    rows: tuple[Row, ...]
    memory: tuple[Memory, ...]
    bandwidth: Bandwidth | None
    failures: tuple[Failure, ...]
    engines: tuple[Engine, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.to_json() for row in self.rows]}


@dataclass(frozen=True)
class Result(Paged, pages="flashnorm.html.benched"):
    """A benchmark, or as much of it as there is yet: then it is not `complete`."""

    settings: Settings
    machine: dict[str, str | int]
    measured: tuple[Measured, ...]
    notes: tuple[str, ...]
    complete: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "machine": self.machine,
            "measured": [found.to_json() for found in self.measured],
            "notes": list(self.notes),
            "complete": self.complete,
        }
