"""What a run has found, in at most 3,000 characters: printed last, where a cut output ends."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import geometric_mean

from benchmarks.gpu import attending, correctness, models, operations, packed, scaled
from benchmarks.gpu.store import Row, Store
from benchmarks.gpu.tables import machine, ratio
from benchmarks.gpu.variants import PAIRS

MOST = 3000  # characters
MORE = "... more in tables.md"


def text(store: Store) -> str:
    """The most wanted figures first; what does not fit is in tables.md."""
    lines, size = [], 0
    for line in _lines(store):
        size += len(line) + 1
        if size > MOST - len(MORE) - 1:
            lines.append(MORE)
            break
        lines.append(line)
    return "\n".join(lines) + "\n"


def _lines(store: Store) -> Iterator[str]:
    yield machine(store)[:400]
    yield _checks(store)
    yield from _loud(store)
    for row in store.rows(models.DECODE):
        yield from _decode(row)
    yield from _operations(store)
    for row in store.rows(models.PREFILL):
        yield f"prefill {row['tokens']} {row['model']}: {_times(row['milliseconds'])}"
    yield from _memory(store)
    for shape, dtype, own, *_, faster, _ in attending.table_rows(store.rows(attending.STAGE)):
        yield f"attention {dtype}, {shape}: {own} µs, {faster} over the best"
    for row in store.rows(packed.STAGE):
        if times := row.get("microseconds"):
            found = ratio(times.get(packed.DENSE), times.get(packed.OURS))
            yield f"{row['format']} {row['shape']}, {row['rows']} rows: {found} over dense bf16"
    for row in store.rows(scaled.STAGE):
        if times := row.get("microseconds"):
            found = ratio(times.get(scaled.FUSED), times.get(scaled.ABSORBED))
            yield f"{row['dtype']} {row['shape']}, {row['rows']} rows: norm in the scale {found}"
    yield from (f"NOT MEASURED {what}: {why[:120]}" for what, why in store.ended.items())


def _checks(store: Store) -> str:
    rows = store.rows(correctness.STAGE)
    return f"checks against float64: {len(rows)}, wrong {sum(bool(r['wrong']) for r in rows)}"


def _loud(store: Store) -> Iterator[str]:
    """What is wrong, of ours and of the other sides."""
    for row in store.rows(correctness.STAGE):
        if row["wrong"]:
            yield f"WRONG {row['way']} {row['norm']} {row['dtype']}: {row['wrong'][:100]}"
    for row in store.rows(packed.STAGE):
        if row["wrong"]:
            yield f"WRONG {row['format']} {row['shape']}, {row['rows']} rows: {row['wrong'][:100]}"
    for row in store.rows(attending.STAGE):
        if row["wrong"]:
            yield f"WRONG attention {row['shape']}: {row['wrong'][:100]}"
    for row in store.rows(operations.STAGE):
        where = f"{row['shape']}, {row['rows']} rows"
        if row["excluded"]:
            yield f"WRONG {where}: {row['excluded'][:100]}"
        yield from (f"RIVAL WRONG {where}, {who}: {why}" for who, why in row["wrong"].items())
    for row in store.rows(models.DECODE):
        for who, why in row["wrong"].items():
            kind = "WRONG" if models.is_ours(who) else "RIVAL WRONG"
            yield f"{kind} {row['model']}, {who}: {why}"


def _decode(row: Row) -> Iterator[str]:
    limit = f"limit {row['limit_milliseconds']:.2f} ms"
    yield f"decode {row['model']} ({limit}): {_times(row['milliseconds'])}"
    if row["device_milliseconds"]:
        alone = ", ".join(f"{k} {v:.2f}" for k, v in row["device_milliseconds"].items())
        yield f"  on the device alone: {alone} ms"
    for who, why in row["failed"].items():
        yield f"  {who}: {why[:110]}"


def _times(found: dict[str, Row]) -> str:
    """Medians, and ours over each of the others that it stands beside; of ours without a part, by
    the name of the part, over ours with it."""
    median = {name: each["median"] for name, each in found.items()}
    times = ", ".join(f"{name} {value:.2f}" for name, value in median.items())
    pairs = [
        f"{own.rpartition(', ')[2] if models.is_ours(other) else other} "
        f"{ratio(median[other], median[own])}"
        for other, own in PAIRS
        if other in median and own in median
    ]
    return f"{times} ms; ours over {', '.join(pairs)}" if pairs else f"{times} ms"


def _operations(store: Store) -> Iterator[str]:
    """A line for each number of rows: the speedup over the best other side, shape by shape."""
    rows = [row for row in store.rows(operations.STAGE) if row.get("speedup")]
    for key in dict.fromkeys((row["rows"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["rows"], row["dtype"]) == key]
        mean = geometric_mean([row["speedup"] for row in own])
        each = ", ".join(f"{row['shape']} {row['speedup']:.2f}" for row in own)
        yield f"norm + linear, {key[0]} rows {key[1]}, over the best: {each}; mean {mean:.2f}x"


def _memory(store: Store) -> Iterator[str]:
    for row in store.rows(models.MEMORY):
        yield f"peak of a prefill of {row['tokens']}, {row['model']}: {_less(row['bytes'])}"
    for row in store.rows(models.TRAINING):
        kept, top = _less(row["saved_bytes"]), _less(row["peak_bytes"])
        yield f"training step of {row['tokens']}, {row['model']}: saved {kept}; peak {top}"


def _less(found: dict[str, int]) -> str:
    plain, own = found.get(models.EAGER), found.get(models.OURS)
    if not plain or own is None:
        return "not measured"
    return f"{plain / 1e6:,.0f} to {own / 1e6:,.0f} MB ({1 - own / plain:.1%} less)"
