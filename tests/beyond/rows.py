"""A row of the table: what became of one model class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EXACT = 1e-10


@dataclass
class Row:
    """One class. Errors are max |Δ| / max |·| of all outputs.

    `error` and `noise`: folded against the original, and the original after every weight moved by
    one part in 2⁵², in true float64. `ours` and `theirs`: accelerated and untouched in float32
    against the float64 truth; `apart`: one against the other; `bound`: what other roundings of
    float32 explain; `shaken`: the original in float32 after every weight moved by one rounding.
    """

    key: str
    library: str
    model: str = ""
    parameters: int = 0
    norms: dict[str, int] = field(default_factory=dict)
    gains: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    error: float | None = None
    noise: float | None = None
    ours: float | None = None
    theirs: float | None = None
    apart: float | None = None
    bound: float | None = None
    shaken: float | None = None
    fused: int = 0
    parts: int = 0
    unfused: dict[str, int] = field(default_factory=dict)
    restored: bool | None = None
    touched: list[str] = field(default_factory=list)
    category: str = ""
    cause: str = ""
    seconds: float = 0.0

    @property
    def sites(self) -> int:
        return sum(self.norms.values())

    @property
    def built(self) -> bool:
        return self.category not in ("cannot be built", "does not run", "does not end or dies")

    @property
    def wrong_fold(self) -> bool:
        return self.error is not None and self.error > max(EXACT, 10 * (self.noise or 0.0))

    @property
    def wrong_acceleration(self) -> bool:
        """Further from the original than rounding explains, or not put back."""
        if self.apart is None or self.bound is None:
            return False
        return self.apart > max(self.bound, 10 * (self.shaken or 0.0)) or self.restored is False

    @property
    def state(self) -> str:
        if self.wrong_fold or self.wrong_acceleration:
            return "wrong"
        if self.error is None or self.category == "cannot be accelerated":
            return "error"
        if self.error > EXACT:
            return "noise"
        return "exact" if self.sites else "no norm"


def counted(rows: list[Row], field_name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(getattr(row, field_name))
    return total
