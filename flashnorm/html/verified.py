"""The page of a verification: the verdict, its figures against their bounds, where models part."""

from __future__ import annotations

from flashnorm.html.charts import Scale
from flashnorm.html.page import Page
from flashnorm.verification.bounds import HALF_RATIO
from flashnorm.verification.report import Pair, Report

AROUND = 2, 6  # modules that are shown before the first wrong one, and from it on
HEIGHT = 120  # of the picture of all modules


def page(report: Report, title: str) -> Page:
    """What `flashnorm verify` says, as a page."""
    first = report.first_wrong_layer
    lines = [
        f"Candidate: {report.candidate}",
        f"Reference: {report.reference}",
        _inputs(report),
    ]
    if first is not None:
        lines.insert(0, f"The first module that differs is {first.path}: {first.error:.1e}.")
    return Page(
        "verify",
        title or f"{_short(report.candidate)} against {_short(report.reference)}",
        _verdict(report),
        "good" if report.ok else "bad",
        tuple(lines),
        "verified.jinja",
        {
            "checks": report.checks,
            "figures": _figures(report),
            "table": _table(report),
            "layers": _layers(report),
            "greedy": report.greedy,
            "notes": report.notes,
        },
    )


def _verdict(report: Report) -> str:
    """In words, with the figure that decides: the float64 error, or the first check that fails."""
    if report.ok:
        return f"Equal: float64 error {report.float64.max:.1e}, bound {report.float64_bound:.1e}"
    failed = next(check for check in report.checks if not check.ok)
    return f"NOT equal: {failed.name} {failed.detail}"


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _inputs(report: Report) -> str:
    return (
        f"Compared: {report.output} at {report.rows} positions of {report.inputs}; width "
        f"{report.width}, depth {report.depth}, {report.stored} weights; {report.seconds:.0f} s."
    )


def _figures(report: Report) -> dict[str, object]:
    """Errors on one scale: those with a bound, then both models against the float64 truth."""
    bounded = [
        ("float64 error", report.float64.max, report.float64_bound),
        ("float32 error", report.float32.max, report.float32_bound),
    ]
    pairs = [("float32 to truth", report.precise)]
    if report.half is not None:
        pairs.append((f"{report.half_dtype} to truth", report.half))
    both = [(pair.reference.typical, pair.candidate.typical) for _, pair in pairs]
    values = [value for _, *two in bounded for value in two] + [v for two in both for v in two]
    scale = Scale.of(values)
    return {
        "ticks": scale.ticks(),
        "bounded": [
            {
                "name": name,
                "words": f"{error:.2e}, bound {bound:.2e}",
                "at": scale.place(error),
                "bound": scale.place(bound),
                "ok": error <= bound,
            }
            for name, error, bound in bounded
        ],
        "pairs": [_both(name, pair, scale, report) for name, pair in pairs],
    }


def _both(name: str, pair: Pair, scale: Scale, report: Report) -> dict[str, object]:
    words, state = f"× {pair.ratio:.3f}", "plain"
    if pair is report.half:
        words += f", bound × {HALF_RATIO}"
        state = "folded" if pair.ratio_lower_bound <= HALF_RATIO else "bad"
    return {
        "name": name,
        "words": words,
        "reference": scale.place(pair.reference.typical),
        "candidate": scale.place(pair.candidate.typical),
        "state": state,
    }


def _table(report: Report) -> list[tuple[str, ...]]:
    """Name, reference, candidate, difference, bound."""
    rows: list[tuple[str, ...]] = [
        ("float64 error, max", "0", "", f"{report.float64.max:.2e}", f"{report.float64_bound:.2e}"),
        ("float32 error, max", "", "", f"{report.float32.max:.2e}", f"{report.float32_bound:.2e}"),
    ]
    for dtype, pair in (("float32", report.precise), (report.half_dtype, report.half)):
        if pair is None:
            continue
        for name in ("max", "rms", "typical"):
            values = [f"{getattr(side, name):.2e}" for side in (pair.reference, pair.candidate)]
            last = [f"× {pair.ratio:.3f}" if name == "typical" else "", ""]
            rows.append((f"{dtype} to truth, {name}", *values, *last))
    if report.kl is not None:
        rows.append(("KL divergence, float64, nats", "", "", f"{report.kl:.2e}", ""))
    if report.perplexity is not None:
        found = report.perplexity
        change = f"{found.candidate / found.reference - 1:+.1e}"
        name = f"perplexity, {found.tokens} tokens by {found.window}"
        rows.append((name, f"{found.reference:.4f}", f"{found.candidate:.4f}", change, ""))
        rows.append(("top-1 agreement", "", "", f"{found.top1:.2%}", ""))
    return rows


def _layers(report: Report) -> dict[str, object] | None:
    """The error of every module in the order of execution; None where none was searched for."""
    if not report.layers:
        return None
    bound, first = report.float64_bound, report.first_wrong_layer
    scale = Scale.of([bound, *(layer.error for layer in report.layers)])
    at = len(report.layers) if first is None else report.layers.index(first)
    shown = range(max(0, at - AROUND[0]), min(len(report.layers), at + AROUND[1]))
    modules = [
        {
            "path": layer.path,
            "error": f"{layer.error:.2e}",
            "height": round(scale.place(layer.error) * HEIGHT / 100, 1),
            "wrong": not layer.error <= bound,
            "first": layer is first,
        }
        for layer in report.layers
    ]
    return {
        "modules": modules,
        "around": [modules[place] for place in shown] if first else [],
        "first": first,
        "bound": round(HEIGHT * (1 - scale.place(bound) / 100), 1),
        "words": f"{bound:.1e}",
        "height": HEIGHT,
        "low": f"1e{scale.low:+03d}",
        "high": f"1e{scale.high:+03d}",
    }
