"""What `flashnorm fold` says."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flashnorm.cli.boundary import Result
from flashnorm.errors import FlashNormError

if TYPE_CHECKING:
    from flashnorm.plan import Plan


def local(name: str) -> Path | str:
    """A path with ~ as a shell has it; a URL as it is. Raises FlashNormError for none."""
    if not name:
        raise FlashNormError("a path is empty: give SRC and DST, as `flashnorm fold model folded`")
    return name if "://" in name else Path(name).expanduser()


def local_source(name: str) -> Path | str:
    """What to fold. Raises FlashNormError where nothing is there that may be a model on a hub."""
    from flashnorm.loading import is_hub_id

    path = local(name)
    if isinstance(path, str):
        return path
    if "/" in name and is_hub_id(name) and not path.exists():
        raise FlashNormError(
            f"{name} does not exist here; if it is a model on the hub, download it first: "
            f"hf download {name} --local-dir {shlex.quote(path.name)}"
        )
    return path


def run_fold(
    source: str,
    target: str,
    inputs: list[Path] | None,
    how: dict[str, bool],
    engine: Literal["local", "ray"],
    ray_address: str | None,
) -> Result:
    """Fold with progress. `how` are strict, untie and center."""
    import flashnorm
    from flashnorm.cli.inputs import read_inputs
    from flashnorm.cli.progress import bytes_bar

    given = read_inputs(inputs)
    start, written = time.perf_counter(), 0
    with bytes_bar(f"recording {source}") as report:

        def progress(done: int, total: int, name: str) -> None:
            nonlocal written
            written = done
            report(done, total, name)

        plan = flashnorm.fold_checkpoint(
            local_source(source),
            local(target),
            strict=how["strict"],
            untie=how["untie"],
            center=how["center"],
            example_inputs=given,
            progress=progress,
            engine=engine,
            ray_address=ray_address,
        )
    took = time.perf_counter() - start
    return written_by_fold(plan, source, target, how["strict"], written, took)


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
    if "://" in source or "://" in target:  # which verify does not read
        return Result(data, Group(head, summary(plan)))
    command = f"flashnorm verify {shlex.quote(source)} {shlex.quote(target)}"
    then = Text(f"prove it: {command}", no_wrap=True, overflow="ignore")  # to be copied whole
    return Result(data, Group(head, summary(plan), then))
