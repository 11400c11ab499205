"""What `flashnorm fold` says."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from flashnorm.cli.boundary import Result

if TYPE_CHECKING:
    from flashnorm.plan import Plan


def written_by_fold(
    plan: Plan, source: str, target: str, strict: bool, size: int, took: float
) -> Result:
    """What `fold` says when it is done. `size` in bytes, `took` in seconds."""
    from rich.console import Group
    from rich.text import Text

    from flashnorm.report import summary, totals

    found = totals(plan)
    data = {
        "source": source,
        "target": target,
        "mode": "strict" if strict else "compat",
        "norms": found.norms,
        "folded": found.folded,
        "bytes": size,
        "seconds": round(took, 3),
        "plan": plan.to_json(),
    }
    head = Text(f"{target} is written: {size / 1e6:,.1f} MB in {took:.1f} s", style="bold")
    command = f"flashnorm verify {shlex.quote(source)} {shlex.quote(target)}"
    then = Text(f"prove it: {command}", no_wrap=True, overflow="ignore")  # to be copied whole
    return Result(data, Group(head, summary(plan), then))
