"""The sum of many verdicts, and how it prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.oracle import Verdict


@dataclass
class Tally:
    models: int = 0
    invalid: int = 0
    untraced: int = 0
    norms: int = 0
    missed: int = 0
    sites: int = 0
    folded: int = 0
    weightless: int = 0
    forced: int = 0
    fused: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    needless: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, str]] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        if verdict.invalid:
            self.invalid += 1
            return
        self.models += 1
        self.untraced += verdict.untraced
        for name in ("norms", "sites", "folded", "weightless", "forced", "fused"):
            setattr(self, name, getattr(self, name) + getattr(verdict, name))
        self.missed += len(verdict.missed)
        self.refused.update(verdict.refused)
        self.needless.update(verdict.needless)
        if verdict.wrong:
            self.wrong.append((verdict.seed, verdict.wrong))

    @property
    def settled(self) -> float:
        """The part of all norms with a gain that were folded, or refused with need.

        Refusals are sampled: the needless part of the forced ones is taken off all of them.
        """
        refusals = self.refused.total()
        needed = 1 - self.needless.total() / self.forced if self.forced else 0.0
        return (self.folded + needed * refusals) / max(1, self.norms - self.weightless)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "settled": self.settled}

    def __str__(self) -> str:
        lines = [
            f"{self.models} models ({self.invalid} drafts did not run, {self.untraced} "
            f"could not be recorded), {self.norms} norms: "
            f"{self.folded} folded, {self.weightless} without a gain, {self.refused.total()} "
            f"refused, {self.missed} missed (or their gain); {self.sites} sites, "
            f"{self.fused} modules accelerated",
            f"{self.forced} refusals forced, {self.needless.total()} of them were not needed; "
            f"{100 * self.settled:.1f} % of the norms with a gain folded or truly refused",
            "refused because:",
            *(f"  {n:6d}  {reason}" for reason, n in self.refused.most_common(25)),
            "refused without need:",
            *(f"  {n:6d}  {reason}" for reason, n in self.needless.most_common(15)),
            f"WRONG: {len(self.wrong)}",
            *(f"  seed {seed}: {what}" for seed, what in self.wrong),
        ]
        return "\n".join(lines)
