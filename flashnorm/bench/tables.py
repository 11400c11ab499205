"""A result as tables: every row of it, those where we lose too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashnorm.bench.machine import line
from flashnorm.bench.records import (
    CHECKS,
    DECODE,
    EAGER,
    FORWARD,
    GENERATE,
    PREFILL,
    Measured,
    Memory,
    Result,
    Row,
)

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """`rows` under `header`; the first column names, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def label(result: Result) -> str:
    """A short name of the model: of a config, the directory that it lies in."""
    path = Path(result.settings.source).expanduser().absolute()
    return path.parent.name if path.name == "config.json" else path.name


def heading(result: Result) -> list[str]:
    """What was measured, where and how."""
    asked = result.settings
    return [
        f"Model: {asked.source}; {asked.tokens} tokens decoded after "
        f"{', '.join(map(str, asked.contexts))}; medians of "
        f"{asked.rounds} interleaved rounds (lowest to highest in brackets).",
        f"Machine: {line(result.machine)}.",
        *result.notes,
    ]


def tables(found: Measured) -> Iterator[Table]:
    """Everything about one dtype."""
    yield from groups(found, CHECKS)
    for context in dict.fromkeys(row.context for row in found.rows if row.context is not None):
        yield from groups(found, DECODE, context)
    yield _prefill(found)
    if found.memory:
        yield _memory(found)
    if found.failures:
        yield failures(found)


def groups(found: Measured, kind: str, place: int = 0) -> Iterator[Table]:
    """What was measured together: `place` tokens of context, or of a prefill."""
    if kind == CHECKS:
        yield _checks(found)
        if found.engines:
            yield _engines(found)
    elif kind == DECODE:
        for way in (GENERATE, FORWARD):
            rows = [row for row in found.rows if row.kind == way and row.context == place]
            if rows:
                yield _decode(found, f"{way}, after {place} tokens", rows)
    elif kind == PREFILL:
        yield _one_prefill(found, place)
    else:
        yield _memory(found)


def failures(found: Measured) -> Table:
    """What was not measured."""
    rows = tuple((each.variant, each.step, each.error) for each in found.failures)
    return Table("not measured", ("variant", "step", "why"), rows)


def _checks(found: Measured) -> Table:
    rows = tuple(
        (
            each.variant,
            f"{each.equal} of {each.tokens}",
            NOTHING if each.margin is None else f"{each.margin:.1e}",
            f"{each.pass_error:.1e}",
            f"{each.decode_error:.1e}",
        )
        for each in found.checks
    )
    header = ("variant", "greedy tokens as eager", "margin there", "error, one pass", "decoding")
    note = "errors of the logits against eager in float64, ‖Δ‖ / ‖truth‖"
    return Table("correctness", header, rows, note)


def _engines(found: Measured) -> Table:
    rows = tuple(
        (
            each.name,
            f"{each.equal} of {each.tokens}",
            NOTHING if each.margin is None else f"{each.margin:.1e}",
            each.engine,
            Path(each.file).name,
        )
        for each in found.engines
    )
    header = ("engine", "greedy tokens as eager", "margin there", "what it is", "file")
    note = "; ".join(f"{each.name}: {each.note}" for each in found.engines)
    return Table("other engines", header, rows, note)


def _decode(found: Measured, title: str, of: list[Row]) -> Table:
    rows = tuple(
        (
            row.variant,
            _spread(row),
            _times(row.speedup),
            f"{row.gigabytes:.1f}" if row.gigabytes is not None else NOTHING,
            _percent(row.of_memory),
            _percent(row.of_weights),
        )
        for row in of
    )
    header = ("variant", "ms/token", "speedup", "GB/s", "of memory", "of weights")
    return Table(title, header, rows, _bandwidth(found))


def _one_prefill(found: Measured, count: int) -> Table:
    rows = tuple(
        (row.variant, _spread(row), _times(row.speedup))
        for row in found.rows
        if row.kind == PREFILL and row.tokens == count
    )
    return Table(f"{PREFILL} of {count}", ("variant", "ms", "speedup"), rows)


def _bandwidth(found: Measured) -> str:
    note = f"{found.token_bytes / 1e6:,.1f} MB of weights a token"
    if found.bandwidth is None:
        return f"{note}; the read bandwidth was not measured: no compiled kernels"
    return (
        f"{note}; reading gives {found.bandwidth.memory:.1f} GB/s beyond all caches, "
        f"{found.bandwidth.weights:.1f} GB/s over a buffer as large as the weights"
    )


def _prefill(found: Measured) -> Table:
    cells = {(row.tokens, row.variant): row for row in found.rows if row.kind == PREFILL}
    names = list(dict.fromkeys(name for _, name in cells))
    others = [name for name in names if name != EAGER]
    rows = tuple(
        (
            str(count),
            *(_median(cells.get((count, name))) for name in names),
            *(_times(_speedup(cells.get((count, name)))) for name in others),
        )
        for count in sorted({count for count, _ in cells})
    )
    header = ("tokens", *(f"{name} ms" for name in names), *(f"{name} speedup" for name in others))
    return Table(PREFILL, header, rows)


def _memory(found: Measured) -> Table:
    rows = tuple(
        (
            each.variant,
            _megabytes(each.peak_rss),
            _megabytes(each.resident),
            _megabytes(each.prefill_rss),
            _megabytes(each.activations),
        )
        for each in found.memory
    )
    size = found.memory[0].tokens
    header = (
        "variant",
        "peak of a process, MB",
        "resident after decoding",
        f"growth in {size} tokens",
        f"allocated in {size} tokens",
    )
    return Table("memory", header, rows, _allocated_note(found.memory))


def _allocated_note(memory: tuple[Memory, ...]) -> str:
    return (
        f"{memory[0].tokens} tokens are one prefill; allocated is the peak of torch's allocator in "
        "it, without the scratch that C++ takes by itself, which the growth of the process holds"
    )


def _spread(row: Row | None) -> str:
    if row is None:
        return NOTHING
    found = row.timing.to_json()
    return f"{found['median']:.2f} ({found['lowest']:.2f}-{found['highest']:.2f})"


def _median(row: Row | None) -> str:
    return NOTHING if row is None else f"{row.timing.median * 1e3:.2f}"


def _speedup(row: Row | None) -> float | None:
    return None if row is None else row.speedup


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def _megabytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 1e6:,.1f}"
