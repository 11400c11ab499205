"""The page of a benchmark: time per token and per pass, and memory, of every variant and engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from flashnorm.bench.records import (
    EAGER,
    FORWARD,
    GENERATE,
    PREFILL,
    VARIANTS,
    Measured,
    Result,
    Row,
)
from flashnorm.bench.tables import heading, label, tables
from flashnorm.html.charts import Bar, Bars, longest, share
from flashnorm.html.page import Page

OURS = [name for name in VARIANTS if name.startswith("flashnorm")]
SAME = 0.02  # a difference of less is none
MEMORY = {
    "peak_rss": "peak of a process",
    "resident": "resident after decoding",
    "prefill_rss": "growth in {} tokens",
    "activations": "allocated in {} tokens",
}


def page(result: Result, title: str) -> Page:
    """What `flashnorm bench` says, as a page."""
    verdict, state, figures = _verdict(result)
    lines = [*figures, *heading(result)]
    if not result.complete:
        lines.insert(0, "Interrupted: this is what was measured until then.")
    return Page(
        "bench",
        title or label(result),
        verdict,
        state,
        tuple(lines),
        "benched.jinja",
        {"measured": [_view(found) for found in result.measured]},
    )


def _verdict(result: Result) -> tuple[str, str, list[str]]:
    """The fastest of our variants at decoding in the first dtype against eager: words and state,
    and its figures."""
    for found in result.measured:
        rows = [row for row in found.rows if row.variant in OURS and row.speedup is not None]
        decoded = [row for row in rows if row.kind in (GENERATE, FORWARD)]
        if decoded:
            best = min(decoded, key=lambda row: row.timing.median)
            reading = [row for row in rows if row.kind == PREFILL and row.variant == best.variant]
            return *_compared(best), [_figures(best, found.dtype), *_prefills(reading)]
    return "no speed of flashnorm was measured", "part", []


def _compared(best: Row) -> tuple[str, str]:
    assert best.speedup is not None
    if abs(best.speedup - 1) < SAME:
        return "As fast as eager at decoding", "part"
    words = f"{best.speedup:.2f} times as fast as eager at decoding"
    return (words, "good") if best.speedup > 1 else (f"Slower: {words}", "bad")


def _figures(best: Row, dtype: str) -> str:
    assert best.speedup is not None
    mine = best.timing.median * 1e3
    eager = mine * best.speedup
    return f"A token takes {best.variant} {mine:.2f} ms, eager {eager:.2f} ms ({dtype})."


def _prefills(rows: Sequence[Row]) -> list[str]:
    """Where it wins and where it loses at reading a prompt."""
    found = ", ".join(f"{row.speedup:.2f} of {row.tokens} tokens" for row in rows)
    return [f"Times as fast at a prefill: {found}."] if found else []


def _view(found: Measured) -> dict[str, object]:
    """One dtype: pictures first, then all tables."""
    return {
        "dtype": found.dtype,
        "checks": _checks(found),
        "decode": list(_decode(found)),
        "prefill": list(_prefill(found)),
        "memory": list(_memory(found)),
        "failures": found.failures,
        "tables": list(tables(found)),
    }


def _checks(found: Measured) -> list[dict[str, object]]:
    rows = [
        {
            "name": each.variant,
            "words": f"{each.equal} of {each.tokens} greedy tokens as eager, error to float64 "
            f"{each.pass_error:.1e} in one pass, {each.decode_error:.1e} decoding",
            "all": each.equal == each.tokens,
        }
        for each in found.checks
    ]
    rows += [
        {
            "name": each.name,
            "words": f"{each.equal} of {each.tokens} greedy tokens as eager; {each.engine}, "
            f"{Path(each.file).name}",
            "all": each.equal == each.tokens,
        }
        for each in found.engines
    ]
    return rows


def _decode(found: Measured) -> Iterator[Bars]:
    """A picture for each context and way; the line is the time to read all weights once."""
    for context in dict.fromkeys(row.context for row in found.rows if row.context is not None):
        for way in (GENERATE, FORWARD):
            rows = [row for row in found.rows if row.kind == way and row.context == context]
            if rows:
                yield _bars(f"{way}, after {context} tokens: ms per token", rows, _floor(found))


def _floor(found: Measured) -> float | None:
    """Seconds to read the weights of one token from memory."""
    if found.bandwidth is None:
        return None
    return found.token_bytes / found.bandwidth.memory / 1e9


def _prefill(found: Measured) -> Iterator[Bars]:
    for count in sorted({row.tokens for row in found.rows if row.kind == PREFILL}):
        rows = [row for row in found.rows if row.kind == PREFILL and row.tokens == count]
        yield _bars(f"{count} token{'s' if count > 1 else ''}: ms", rows, None)


def _bars(title: str, rows: Sequence[Row], floor: float | None) -> Bars:
    end = longest([max(row.timing.seconds) for row in rows] + [floor or 0.0])
    limit = None if floor is None else (share(floor, end), f"{floor * 1e3:.2f} ms")
    return Bars(title, tuple(_bar(row, end) for row in rows), limit)


def _bar(row: Row, end: float) -> Bar:
    times = "" if row.speedup is None or row.variant == EAGER else f"{row.speedup:.2f}×"
    seconds = row.timing.seconds
    return Bar(
        name=row.variant,
        state=_state(row.variant),
        words=f"{row.timing.median * 1e3:.2f}",
        width=share(row.timing.median, end),
        low=share(min(seconds), end),
        high=share(max(seconds), end),
        more=times,
    )


def _state(variant: str) -> str:
    if variant in OURS:
        return "ours"
    return "eager" if variant == EAGER else "others"


def _memory(found: Measured) -> Iterator[Bars]:
    for field, title in MEMORY.items():
        sizes = [(each, getattr(each, field)) for each in found.memory]
        known = [(each, size) for each, size in sizes if size is not None]
        end = longest([size for _, size in known])
        if known:
            bars = [
                Bar(e.variant, _state(e.variant), f"{size / 1e6:,.1f}", share(size, end))
                for e, size in known
            ]
            yield Bars(f"{title.format(known[0][0].tokens)}: MB", tuple(bars))
