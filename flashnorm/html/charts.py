"""Figures as pictures: dots on a scale of powers of ten, and bars that share a scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite, log10

WIDEST = 97.0  # percent of the space that the longest bar takes


@dataclass(frozen=True)
class Scale:
    """Powers of ten from `low` to `high`, over 100 percent."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        """Room for all values that have a logarithm."""
        known = [log10(value) for value in values if 0 < value < inf]
        if not known:
            return cls(-1, 0)
        low, high = floor(min(known)), ceil(max(known))
        return cls(low - 1, max(high, low) + 1)

    def place(self, value: float) -> float:
        """Where a value is, in percent; zero at the left end, what is not finite at the right."""
        if value == 0:
            return 0.0
        if not isfinite(value):
            return 100.0
        share = (log10(value) - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and names of some whole powers."""
        step = max(1, ceil((self.high - self.low) / 6))
        return [
            (self.place(10.0**at), f"1e{at:+03d}") for at in range(self.low, self.high + 1, step)
        ]


@dataclass(frozen=True)
class Bar:
    """A figure as a bar. Widths in percent: of the bar, and from the lowest to the highest one."""

    name: str
    state: str
    words: str
    width: float
    low: float | None = None
    high: float | None = None
    more: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars of one scale. `limit` is a line across them, in percent, and what it is."""

    title: str
    bars: tuple[Bar, ...]
    limit: tuple[float, str] | None = None


def share(value: float, longest: float) -> float:
    """The width of a value where the longest of its scale is `longest`."""
    return round(WIDEST * value / longest, 2) if longest > 0 else 0.0


def longest(values: Sequence[float]) -> float:
    """The end of a scale."""
    return max(values, default=0.0)
