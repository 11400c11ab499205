"""Everything that was found, as tables: each row of it, those where we lose too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import correctness, models, operations, scaled
from benchmarks.gpu.operations import COMPILED, LINEAR, OURS, OURS_GAIN, TORCH, TRITON
from benchmarks.gpu.store import Store
from flashnorm.bench.nouns import COMPILE, EAGER
from flashnorm.bench.nouns import OURS as OUR_MODEL
from flashnorm.bench.nouns import OURS_COMPILED as OUR_COMPILED
from flashnorm.bench.show import markdown_table
from flashnorm.bench.tables import NOTHING, Table

VARIANTS = (EAGER, COMPILE, OUR_MODEL, OUR_COMPILED)
SIDES = (OURS, OURS_GAIN, TORCH, TRITON, COMPILED, LINEAR)
DRY = "A dry run on a CPU with tiny shapes: no figure here means anything."


def markdown(store: Store) -> str:
    """All tables under a heading that names the machine."""
    lines = ["# Norm + linear on a GPU", ""]
    for environment in store.runs:
        lines += [machine(environment), ""]
    for table in tables(store):
        lines += markdown_table(table)
    return "\n".join(lines).rstrip() + "\n"


def machine(environment: dict[str, Any]) -> str:
    """The machine in one line, with what it can do."""
    if environment["card"] == "cpu dry run":
        return DRY
    clocks = ", ".join(f"{name} {value}" for name, value in environment["clocks"].items())
    return (
        f"{environment['card']} ({environment['capability']}, {clocks or 'no nvidia-smi'}), "
        f"{environment['gigabytes_per_second']:.0f} GB/s and {environment['teraflops']:.0f} "
        f"TFLOP/s measured in the same run; torch {environment['torch']}, triton "
        f"{environment['triton']}, transformers {environment['transformers']}, flashnorm "
        f"{environment['flashnorm']}, {environment['date']}."
    )


def tables(store: Store) -> Iterator[Table]:
    yield _correctness(store)
    yield _operations(store)
    yield _decode(store)
    yield _held(store)
    yield _prefill(store)
    yield _memory(store)
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
        "rows",
        *(f"{name}, µs" for name in SIDES),
        "speedup over the best",
        "of the roofline",
        "way",
    )
    note = (
        "bf16, CUDA graphs on both sides, weights beyond the second-level cache; the best of "
        "torch, triton and torch.compile; the roofline is the larger of bytes and operations over "
        "what the card did in this run"
    )
    return Table("Norm + linear", header, tuple(map(_operation, rows)), note)


def _operation(row: dict[str, Any]) -> tuple[str, ...]:
    if row["excluded"]:
        empty = (NOTHING,) * (len(SIDES) + 2)
        return (row["shape"], str(row["rows"]), *empty, row["excluded"])
    times = row["microseconds"]
    return (
        row["shape"],
        str(row["rows"]),
        *(_figure(times.get(name), ".2f") for name in SIDES),
        f"{_figure(row['speedup'], '.2f')}x ({row['best'] or NOTHING})",
        f"{row['of_roofline']:.0%} ({row['limit']})",
        row["way"],
    )


def _figure(value: float | None, form: str) -> str:
    return NOTHING if value is None else f"{value:{form}}"


def _decode(store: Store) -> Table:
    lines = [
        (row["model"], "1", *_cells(row), f"{row['limit_milliseconds']:.2f}")
        for row in store.rows(models.DECODE)
    ]
    note = "one sequence; the limit is every weight read once at the bandwidth of this run"
    header = ("model", "tokens", *_names("ms/token"), *_speedups(), "limit, ms")
    return Table("Decoding", header, tuple(lines), note)


def _prefill(store: Store) -> Table:
    rows = [row for row in store.rows(models.PREFILL) if "milliseconds" in row]
    lines = tuple((row["model"], str(row["tokens"]), *_cells(row)) for row in rows)
    return Table("Prefill", ("model", "tokens", *_names("ms"), *_speedups()), lines)


def _names(unit: str) -> tuple[str, ...]:
    return tuple(f"{name}, {unit}" for name in VARIANTS)


def _speedups() -> tuple[str, ...]:
    return ("ours over eager", "ours compiled over compile")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Medians of all variants, then ours over eager and ours compiled over compiled."""
    median = {name: found["median"] for name, found in row["milliseconds"].items()}
    pairs = ((EAGER, OUR_MODEL), (COMPILE, OUR_COMPILED))
    return (
        *(_figure(median.get(name), ".3f") for name in VARIANTS),
        *(_ratio(median.get(other), median.get(own)) for other, own in pairs),
    )


def _ratio(other: float | None, own: float | None) -> str:
    return NOTHING if other is None or own is None else f"{other / own:.2f}x"


def _held(store: Store) -> Table:
    lines = tuple(
        (
            row["model"],
            name,
            f"{found['equal']} of {found['tokens']}",
            _figure(found["margin"], ".1e"),
            f"{found['error']:.1e}",
            f"{found['eager_error']:.1e}",
        )
        for row in store.rows(models.DECODE)
        for name, found in row["checks"].items()
    )
    header = (
        "model",
        "variant",
        "greedy tokens as eager",
        "margin there",
        "error",
        "eager's error",
    )
    note = "errors of the logits against eager in float64, ‖Δ‖ / ‖truth‖"
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


def _missing(store: Store) -> Table:
    """What failed, row by row, and what the time did not reach."""
    lines = [(stage, "", why) for stage, why in store.ended.items()]
    for stage, rows in store.stages.items():
        for row in rows:
            where = ", ".join(
                str(row[key]) for key in ("model", "shape", "rows", "dtype") if key in row
            )
            lines += [(stage, f"{where}: {who}", why) for who, why in row.get("failed", {}).items()]
    return Table("Not measured", ("stage", "what", "why"), tuple(lines))
