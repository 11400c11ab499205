"""What a report says, line by line and cell by cell, and as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashnorm.verification.report import LayerError, Pair, Report

HEADER = ("", "reference", "candidate", "difference", "bound")
LAYERS = ("module", "max|Δ|/max|y|")
FIRST = "modules from the first wrong one on"
OK = "The candidate computes what the reference computes."
WRONG = "The candidate does NOT compute what the reference does."
AFTERWARDS = "every compared module keeps within the bound: the error is made after them"


def plain(report: Report) -> str:
    """The report without colours, its columns aligned."""
    lines = [*heading(report), "", *_aligned([HEADER, *figures(report)]), ""]
    lines += [f"{'ok  ' if c.ok else 'FAIL'} {c.name}: {c.detail}" for c in report.checks]
    lines.append(OK if report.ok else WRONG)
    if report.layers and report.first_wrong_layer is None:
        lines.append(AFTERWARDS)
    elif report.layers:
        cells = [(layer.path, f"{layer.error:.2e}") for layer in wrong_layers(report)]
        lines += ["", FIRST, *_aligned([LAYERS, *cells])]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def heading(report: Report) -> tuple[str, str]:
    """Which models, and on what they were compared."""
    return f"{report.reference}  against  {report.candidate}", (
        f"{report.output} at {report.rows} positions of {report.inputs}, {report.seconds:.0f} s; "
        f"width {report.width}, depth {report.depth}, {report.stored} weights"
    )


def figures(report: Report) -> Iterator[tuple[str, str, str, str, str]]:
    """The rows of the table of figures, under `HEADER`."""
    exact, bound = report.float64, report.float64_bound
    yield "float64 error, max", "0", "", f"{exact.max:.2e}", f"{bound:.2e}"
    single, bound = report.float32, report.float32_bound
    yield "float32 error, max", "", "", f"{single.max:.2e}", f"{bound:.2e}"
    yield from _pair("float32", report.precise)
    if report.half is not None:
        yield from _pair(report.half_dtype, report.half)
    if report.kl is not None:
        yield "KL divergence, float64, nats", "", "", f"{report.kl:.2e}", ""
    if report.perplexity is not None:
        found = report.perplexity
        change = f"{found.candidate / found.reference - 1:+.1e}"
        name = f"perplexity, {found.tokens} tokens by {found.window}"
        yield name, f"{found.reference:.4f}", f"{found.candidate:.4f}", change, ""
        yield "top-1 agreement", "", "", f"{found.top1:.2%}", ""


def _pair(dtype: str, pair: Pair) -> Iterator[tuple[str, str, str, str, str]]:
    for name in ("max", "rms", "typical"):
        first, second = (f"{getattr(side, name):.2e}" for side in (pair.reference, pair.candidate))
        ratio = f"× {pair.ratio:.3f}" if name == "typical" else ""
        yield f"{dtype} to truth, {name}", first, second, ratio, ""


def wrong_layers(report: Report) -> Sequence[LayerError]:
    """The first wrong module with some before and behind it; nothing where none is wrong."""
    first = report.first_wrong_layer
    if first is None:
        return ()
    start = report.layers.index(first)
    return report.layers[max(0, start - 2) : start + 6]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in cells
    ]
