"""The record of a comparison of weights: what differs, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flashnorm.checkpoint.compare import Difference
from flashnorm.checkpoint.contents import FileDifference
from flashnorm.verification.report import Check, finite

WEIGHTS_REPORT_VERSION = 1
LISTED = 100  # of everything that differs, how much is kept


@dataclass(frozen=True)
class WeightsReport:
    """Whether a checkpoint is, bit for bit, what a fold makes of another.

    `mode` is compat or strict, or copy where nothing folds. `compared` tensors of `nbytes` in all
    were read. `wrong` and `files` hold the first differences, `wrong_count` and `files_count` say
    how many there are. `notes` are about what does not count.
    """

    reference: str
    candidate: str
    mode: str
    folded: int
    compared: int
    nbytes: int
    wrong: tuple[Difference, ...]
    wrong_count: int
    files: tuple[FileDifference, ...]
    files_count: int
    notes: tuple[str, ...]
    seconds: float
    version: int = WEIGHTS_REPORT_VERSION

    @property
    def checks(self) -> tuple[Check, ...]:
        """The parts of the verdict."""
        tensors = f"{self.compared} compared, {self.wrong_count} wrong"
        files = f"{self.files_count} differences in config, index, headers and other files"
        return (
            Check("tensors", not self.wrong_count, tensors),
            Check("files", not self.files_count, files),
        )

    @property
    def ok(self) -> bool:
        """Whether every check passes."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dict of all of it, with the verdict under `ok` and `checks`."""
        verdict = {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}
        return finite({**verdict, **asdict(self)})

    def __rich__(self) -> Any:
        from flashnorm.verification.weights_show import panel

        return panel(self)

    def __str__(self) -> str:
        from flashnorm.verification.show import as_text
        from flashnorm.verification.weights_show import panel

        return as_text(panel(self))


def problem(one: Difference) -> str:
    """How a tensor differs, in words."""
    if one.what in ("missing", "extra"):
        return f"is {one.what}: {one.expected or one.found}"
    if one.what != "values":
        return f"is {one.found}, expected {one.expected}"
    largest = "" if one.largest is None else f", max|Δ| {one.largest:.2e}"
    at = ", ".join(map(str, one.first))
    said = (
        f"[{at}] is {one.found}, expected {one.expected}; {one.count} of {one.numel} elements "
        f"differ{largest}"
    )
    return f"{said} (a sum, whose last bit may depend on the machine)" if one.summed else said
