"""Everything that was found, as tables: each row of it, those where we lose too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import attending, correctness, models, operations, packed, scaled
from benchmarks.gpu.operations import (
    COMPILED,
    LINEAR,
    OURS,
    OURS_GAIN,
    TORCH,
    TRITON,
    WITHOUT,
)
from benchmarks.gpu.records import CEILINGS
from benchmarks.gpu.store import Row, Store
from benchmarks.gpu.variants import PAIRS
from flashnorm.bench.records import EAGER
from flashnorm.bench.records import OURS as OUR_MODEL
from flashnorm.bench.show import markdown_table
from flashnorm.bench.tables import NOTHING, Table

SIDES = (OURS, OURS_GAIN, TORCH, TRITON, COMPILED, LINEAR)
DRY = "A dry run on a CPU with tiny shapes: no figure here means anything."


def markdown(store: Store) -> str:
    """All tables under a heading that names the machine."""
    lines = ["# Norm + linear on a GPU", "", machine(store), ""]
    for table in tables(store):
        if table.rows:
            lines += markdown_table(table)
    return "\n".join(lines).rstrip() + "\n"


def machine(store: Store) -> str:
    """The machine of the last run in one line, with what it can do."""
    environment, ceiling = store.runs[-1], store.find(CEILINGS)
    if environment["card"] == "cpu dry run":
        return DRY
    clocks = ", ".join(f"{name} {value}" for name, value in environment["clocks"].items())
    able = (
        f"{ceiling['bytes'] / 1e9:.0f} GB/s and {ceiling['operations'] / 1e12:.0f} TFLOP/s measured"
        if ceiling
        else "ceilings not measured"
    )
    return (
        f"{environment['card']} ({environment['capability']}), {able}; torch "
        f"{environment['torch']}, triton {environment['triton']}, transformers "
        f"{environment['transformers']}, flashnorm {environment['flashnorm']}, "
        f"{environment['date']}; {clocks or 'no nvidia-smi'}."
    )


def tables(store: Store) -> Iterator[Table]:
    yield _correctness(store)
    yield _operations(store)
    yield _without(store)
    yield _decode(store)
    yield _held(store)
    yield _attention(store)
    yield _prefill(store)
    yield _memory(store)
    yield _packed(store)
    yield _scaled(store)
    yield _missing(store)


def _correctness(store: Store) -> Table:
    """One line per way and norm; every failure is a line of its own."""
    rows = store.rows(correctness.STAGE)
    lines: list[tuple[str, ...]] = []
    for group in dict.fromkeys((row["way"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["way"], row["dtype"]) == group]
        shares = [row["share"] for row in own if row["share"] is not None]
        worst = f"{max(shares):.2f}" if shares else NOTHING
        wrong = sum(1 for row in own if row["wrong"])
        lines.append((*group, str(len(own)), str(wrong), worst))
    for row in rows:
        if row["wrong"]:
            what = ", ".join(f"{k}={v}" for k, v in row.items() if k not in ("run", "share"))
            lines.append((f"WRONG: {what}", "", "", "", ""))
    header = ("way", "dtype", "checks", "wrong", "largest share of its bound")
    return Table("Correctness against float64", header, tuple(lines))


def _operations(store: Store) -> Table:
    rows = store.rows(operations.STAGE)
    header = (
        "shape",
        "dtype",
        "rows",
        *(f"{name}, µs" for name in SIDES),
        "speedup over the best",
        "of the roofline",
        "way",
    )
    note = (
        "CUDA graphs on all sides, weights beyond the second-level cache; the best of torch, "
        "triton and torch.compile, also where it is wrong (marked !, and below); the roofline is "
        "the larger of bytes and operations over what the card did in this run"
    )
    return Table("Norm + linear", header, tuple(map(_operation, rows)), note)


def _operation(row: dict[str, Any]) -> tuple[str, ...]:
    if row["excluded"]:
        empty = (NOTHING,) * (len(SIDES) + 2)
        return (row["shape"], row["dtype"], str(row["rows"]), *empty, row["excluded"])
    times = row["microseconds"]
    return (
        row["shape"],
        row["dtype"],
        str(row["rows"]),
        *(_figure(times.get(name), ".2f") + _mark(row, name) for name in SIDES),
        f"{_figure(row['speedup'], '.2f')}x ({row['best'] or NOTHING})",
        f"{row['of_roofline']:.0%} ({row['limit']})",
        row["way"],
    )


def _without(store: Store) -> Table:
    """What a part of our kernel is worth: a line for each that a call has."""
    lines = [
        (
            row["shape"],
            row["dtype"],
            str(row["rows"]),
            name,
            f"{row['microseconds'][OURS]:.2f}",
            f"{row['microseconds'][name]:.2f}",
            ratio(row["microseconds"][name], row["microseconds"][OURS]),
        )
        for row in store.rows(operations.STAGE)
        for name in WITHOUT
        if name in row.get("microseconds", {})
    ]
    header = ("shape", "dtype", "rows", "what is missing", "with it, µs", "without, µs", "worth")
    return Table("Norm + linear, each part with and without", header, tuple(lines))


def _figure(value: float | None, form: str) -> str:
    return NOTHING if value is None else f"{value:{form}}"


def _mark(row: Row, name: str) -> str:
    return " !" if name in row["wrong"] else ""


def _decode(store: Store) -> Table:
    """A line for each variant, beside those that were timed in turn with it."""
    lines = []
    for row in store.rows(models.DECODE):
        limit, alone = row["limit_milliseconds"], row["device_milliseconds"]
        for name, found in row["milliseconds"].items():
            lines.append(
                (
                    f"{row['model']}, {row['group']}",
                    name + _mark(row, name),
                    f"{found['median']:.3f}",
                    f"{found['lowest']:.3f} to {found['highest']:.3f}",
                    _figure(alone.get(name), ".3f"),
                    _over_pair(name, row["milliseconds"]),
                    f"{limit / alone[name]:.0%}" if alone.get(name) else NOTHING,
                )
            )
    header = (
        "model, timed together",
        "variant",
        "ms/token",
        "range",
        "of it on the device",
        "over its counterpart",
        "of the bandwidth, on the device",
    )
    note = (
        "one sequence, 64 tokens before; its counterpart is the same without us, and for what "
        "lacks a part ours with it; on the device: one step launched ahead, so that no gap is "
        "Python's; the bandwidth is that of this run, with every weight read once"
    )
    return Table("Decoding", header, tuple(lines), note)


def _attention(store: Store) -> Table:
    sides = (attending.OURS, attending.GROUPED, attending.REPEATED)
    header = ("case", "dtype", *(f"{name}, µs" for name in sides), "over the best", "wrong")
    lines = tuple(attending.table_rows(store.rows(attending.STAGE)))
    note = (
        "CUDA graphs on all sides, caches beyond the second-level cache, a mask of what is in use"
    )
    return Table("Attention of one token", header, lines, note)


def _over_pair(name: str, found: dict[str, Row]) -> str:
    for other, own in PAIRS:
        if own == name and other in found:
            return ratio(found[other]["median"], found[name]["median"])
    return ""


def _prefill(store: Store) -> Table:
    lines = [
        (
            f"{row['model']}, {row['tokens']} tokens, {row['group']}",
            name,
            f"{found['median']:.2f}",
            _over_pair(name, row["milliseconds"]),
        )
        for row in store.rows(models.PREFILL)
        for name, found in row["milliseconds"].items()
    ]
    header = ("model, timed together", "variant", "ms", "ours over the same without us")
    return Table("Prefill", header, tuple(lines))


def ratio(other: float | None, own: float | None) -> str:
    return NOTHING if not other or not own else f"{other / own:.2f}x"


def _held(store: Store) -> Table:
    lines = tuple(
        (
            f"{row['model']}, {row['group']}",
            name,
            f"{found['equal']} of {found['tokens']}",
            _figure(found["margin"], ".1e"),
            f"{found['error']:.1e}",
            f"{found['eager_error']:.1e}",
            found["truth"],
        )
        for row in store.rows(models.DECODE)
        for name, found in row["checks"].items()
    )
    header = (
        "model, timed together",
        "variant",
        "greedy tokens as eager",
        "margin there",
        "error",
        "eager's error",
        "against eager in",
    )
    note = "errors of the logits, ‖Δ‖ / ‖truth‖"
    return Table("Tokens", header, lines, note)


def _memory(store: Store) -> Table:
    lines = []
    for row in store.rows(models.MEMORY):
        lines.append((row["model"], f"prefill of {row['tokens']}, peak", *_saved(row["bytes"])))
    for row in store.rows(models.TRAINING):
        for name, label in (("peak_bytes", "peak"), ("saved_bytes", "saved for backward")):
            what = f"training step of {row['tokens']}, {label}"
            lines.append((row["model"], what, *_saved(row[name])))
    header = ("model", "what", f"{EAGER}, MB", f"{OUR_MODEL}, MB", "less")
    note = "beyond the weights; a training step's peak holds the gradients"
    return Table("Memory", header, tuple(lines), note)


def _saved(found: dict[str, int]) -> tuple[str, ...]:
    plain, own = found.get(EAGER), found.get(OUR_MODEL)
    cells = (NOTHING if each is None else f"{each / 1e6:,.1f}" for each in (plain, own))
    less = NOTHING if not plain or own is None else f"{1 - own / plain:.1%}"
    return (*cells, less)


def _scaled(store: Store) -> Table:
    sides = (scaled.ABSORBED, scaled.FUSED, scaled.BEFORE)
    lines = [
        (
            f"{row['shape']}, {row['dtype']}",
            str(row["rows"]),
            *(_figure(row["microseconds"].get(name), ".2f") for name in (*sides, scaled.PRODUCT)),
            *(_figure(row["errors"].get(name), ".5f") for name in sides[::2]),
            row["wrong"],
        )
        for row in store.rows(scaled.STAGE)
        if "microseconds" in row
    ]
    times = tuple(f"{name}, µs" for name in (*sides, scaled.PRODUCT))
    errors = tuple(f"error, {name}" for name in sides[::2])
    header = ("shape", "rows", *times, *errors, "wrong")
    note = "errors against float64 with the same quantized weight, ‖Δ‖ / ‖truth‖"
    return Table("FP8 and INT8", header, tuple(lines), note)


def _packed(store: Store) -> Table:
    sides = (packed.OURS, packed.DENSE, packed.COMPILED, packed.LIBRARY)
    lines = [
        (
            f"{row['shape']}, {row['format']}",
            str(row["rows"]),
            *(_figure(row.get("microseconds", {}).get(name), ".2f") for name in sides),
            *(_figure(row.get("errors", {}).get(name), ".5f") for name in sides),
            f"{row['of_bandwidth']:.0%}" if row.get("of_bandwidth") else NOTHING,
            row["wrong"],
        )
        for row in store.rows(packed.STAGE)
    ]
    times = tuple(f"{name}, µs" for name in sides)
    errors = tuple(f"error, {name}" for name in sides)
    header = ("shape", "rows", *times, *errors, "of the bandwidth", "wrong")
    note = "errors against float64 with the same packed weight, ‖Δ‖ / ‖truth‖; bytes are its own"
    return Table("Packed weights", header, tuple(lines), note)


def _missing(store: Store) -> Table:
    """What is wrong or failed, row by row, and what the time did not reach."""
    lines = [(stage, "", why) for stage, why in store.ended.items()]
    for stage, rows in store.stages.items():
        for row in rows:
            keys = ("model", "shape", "rows", "dtype", "group")
            where = ", ".join(str(row[key]) for key in keys if key in row)
            wrong = row["wrong"] if isinstance(row.get("wrong"), dict) else {}
            for kind, found in (("", row.get("failed", {})), ("WRONG: ", wrong)):
                lines += [(stage, f"{where}: {who}", kind + why) for who, why in found.items()]
    return Table("Wrong, or not measured", ("stage", "what", "why"), tuple(lines))
