"""The records of a verification: what was measured, against which bound, and the verdict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

from flashnorm.paged import Paged
from flashnorm.verification.bounds import HALF_RATIO

REPORT_VERSION = 1


@dataclass(frozen=True)
class Deviation:
    """How far an output is from the truth.

    `max` is max|Δ| / max|truth|, `rms` is ‖Δ‖ / ‖truth‖, `typical` the geometric mean over the
    rows of ‖Δ_row‖ / ‖truth_row‖: it does not hang on the few rows with the largest errors.
    """

    max: float
    rms: float
    typical: float


@dataclass(frozen=True)
class Pair:
    """The same deviation of both models, each from the float64 truth of the reference.

    `spread` is the standard error of the logarithm of their ratio, over the rows.
    """

    reference: Deviation
    candidate: Deviation
    spread: float

    @property
    def ratio(self) -> float:
        """Candidate over reference, of the typical deviations; 1 where both are exact."""
        if self.reference.typical == 0:
            return 1.0 if self.candidate.typical == 0 else float("inf")
        return self.candidate.typical / self.reference.typical

    @property
    def ratio_lower_bound(self) -> float:
        """The ratio less two standard errors: what is left when chance is taken off."""
        return self.ratio * exp(-2 * self.spread)


@dataclass(frozen=True)
class Greedy:
    """The tokens that both models write. `margin` is the reference's logit gap at `divergence`.

    A margin within `tolerance` is a tie: the float32 difference of the models may turn it.
    """

    reference: tuple[int, ...]
    candidate: tuple[int, ...]
    divergence: int | None
    margin: float | None
    tolerance: float
    prompt_tokens: int
    texts: tuple[str, str] | None = None

    @property
    def ok(self) -> bool:
        return self.divergence is None or (
            self.margin is not None and self.margin <= self.tolerance
        )


@dataclass(frozen=True)
class Perplexity:
    """exp(mean −log p) of both models over `tokens` predictions, in windows of `window` tokens.

    `top1` is the share of these positions at which both models prefer the same token.
    """

    reference: float
    candidate: float
    top1: float
    tokens: int
    window: int


@dataclass(frozen=True)
class LayerError:
    """max|Δ| / max|truth| of the output of one module, in float64."""

    path: str
    error: float


@dataclass(frozen=True)
class Weights:
    """The tensors of a fold against what it makes of the reference, bit for bit.

    compared: how many; wrong: the names of those that differ, of which `first` says how.
    """

    compared: int
    wrong: tuple[str, ...]
    first: str


@dataclass(frozen=True)
class Check:
    """One part of the verdict."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report(Paged, pages="flashnorm.html.verified"):
    """Whether the candidate computes what the reference computes, with every figure behind it.

    `float64` and `float32` are the candidate against the reference in that precision; `precise` and
    `half` are both models against the float64 truth of the reference, in float32 and in
    `half_dtype`. `kl` is in nats per position. `layers` holds the compared modules in the order of
    execution, and is empty where the float64 outputs agree. `weights` are there where both are
    directories, and the candidate says that this version folded it. What could not be measured is
    None, and `notes` say why.
    """

    reference: str
    candidate: str
    output: str
    inputs: str
    rows: int
    width: int
    depth: int
    stored: str
    float64: Deviation
    float64_bound: float
    float32: Deviation
    float32_bound: float
    precise: Pair
    half_dtype: str
    half: Pair | None
    kl: float | None
    perplexity: Perplexity | None
    greedy: Greedy | None
    layers: tuple[LayerError, ...]
    notes: tuple[str, ...]
    seconds: float
    weights: Weights | None = None
    version: int = REPORT_VERSION

    @property
    def checks(self) -> tuple[Check, ...]:
        """The parts of the verdict that apply to these models."""
        error = self.float64.max
        found = [
            Check(
                "float64 error",
                error <= self.float64_bound,
                f"{error:.2e}, bound {self.float64_bound:.2e}",
            ),
        ]
        if self.half is not None:
            words = f"{self.half.ratio:.3f} times the original's"
            words += f" (± {2 * self.half.spread:.0%}), bound {HALF_RATIO}"
            found.append(
                Check(f"{self.half_dtype} error", self.half.ratio_lower_bound <= HALF_RATIO, words)
            )
        if self.greedy is not None:
            found.append(Check("greedy tokens", self.greedy.ok, _greedy_words(self.greedy)))
        if self.weights is not None:
            found.append(Check("weights", not self.weights.wrong, _weights_words(self.weights)))
        return tuple(found)

    @property
    def ok(self) -> bool:
        """Whether every check passes."""
        return all(check.ok for check in self.checks)

    @property
    def first_wrong_layer(self) -> LayerError | None:
        """The first module, in the order of execution, beyond the float64 bound."""
        wrong = (layer for layer in self.layers if not layer.error <= self.float64_bound)
        return next(wrong, None)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dict of all figures, with the verdict under `ok` and `checks`."""
        first = self.first_wrong_layer
        verdict = {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "first_wrong_layer": asdict(first) if first else None,
        }
        figures = json.loads(json.dumps(asdict(self)))
        if self.half is not None:
            figures["half"]["ratio"] = self.half.ratio
        return finite({**verdict, **figures})

    def __rich__(self) -> Any:
        from flashnorm.verification.show import panel

        return panel(self)

    def __str__(self) -> str:
        from flashnorm.verification.plain import plain

        return plain(self)


def _weights_words(weights: Weights) -> str:
    if not weights.wrong:
        return f"{weights.compared} tensors are, bit for bit, what the fold makes"
    return (
        f"{len(weights.wrong)} of {weights.compared} are not what the fold makes: {weights.first}"
    )


def _greedy_words(greedy: Greedy) -> str:
    if greedy.divergence is None:
        return f"{len(greedy.reference)} of {len(greedy.reference)} equal"
    margin = "unknown" if greedy.margin is None else f"{greedy.margin:.2e}"
    return (
        f"differ from token {greedy.divergence} on, where the reference's margin is {margin} "
        f"({'a tie' if greedy.ok else 'no tie'} within {greedy.tolerance:.2e})"
    )


def finite(value: Any) -> Any:
    """JSON knows no NaN or infinity: they become strings."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
