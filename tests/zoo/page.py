"""docs/coverage.md from the rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch

from .rows import Row

# The last section of the page, which `python -m tests.beyond` makes.
BEYOND = "## Beyond transformers"
HEAD = (
    "| type | model | norms | gain folded | kept | none | bias | centering | scale | error | noise "
    "| needed | kept because |"
)


def page(rows: list[Row]) -> str:
    import transformers

    lines = [
        "# Coverage",
        "",
        "Which models flashnorm folds exactly, one by one, and why not the others. "
        f"Made by `python -m tests.zoo.coverage` with transformers {transformers.__version__} and "
        f"torch {torch.__version__.split('+')[0]}: every model type that can be built tiny, with "
        "random gains and biases, folded in memory, float64 with all casts kept in float64. "
        "*error* is max |Δ| / max |·| of all outputs against the original, *noise* the same after "
        "every weight moved by one part in 2⁵². *needed* counts the refused gains that change an "
        "output when they are folded all the same. *bias*, *centering* and *scale* count what "
        "happens to each of them, but for what is not there.",
        "",
        total(rows),
        "",
        "## Causal LMs, and variants of them",
        "",
        summary(of_group(rows, "causal", "variant"), "causal-LM types and variants"),
        "",
        *_table(of_group(rows, "causal", "variant")),
        "",
        "## Encoders, encoder-decoders, vision, sound, series and several of these together",
        "",
        "The class is the one that the first auto mapping names, heads before bare models; without "
        "one the last of the type's own module. The inputs are the richest that a rule can make.",
        "",
        summary(_covered(of_group(rows, "further")), "further types"),
        "",
        *_table(_covered(of_group(rows, "further"))),
        "",
        "## Not covered",
        "",
        *_uncovered(rows),
        "",
    ]
    return "\n".join(lines)


def beyond(text: str) -> str:
    """The last section of a page that there is; empty without one."""
    return "".join(text.partition(f"\n{BEYOND}\n")[1:])


def with_beyond(text: str, section: str) -> str:
    """The page with this last section in the place of the one that it has."""
    return text.removesuffix(beyond(text)).rstrip() + "\n" + (section or "")


def of_group(rows: list[Row], *groups: str) -> list[Row]:
    return [row for row in rows if row.group in groups]


def _covered(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.sites]


def total(rows: list[Row]) -> str:
    types = [row for row in rows if row.group != "variant"]
    covered = _covered(types)
    exact = sum(row.exact for row in covered)
    normless = sum(row.traced and not row.sites for row in types)
    return (
        f"{len(types)} model types: {len(covered)} built, run and folded, {exact} of them exact, "
        f"{sum(row.wrong for row in covered)} wrong; {normless} have no norm; "
        f"{len(types) - len(covered) - normless} not covered, for the causes at the end."
    )


def summary(rows: list[Row], what: str) -> str:
    traced = [row for row in rows if row.traced]
    exact = [row for row in traced if row.exact]
    states = {s: sum(row.count("gain", s) for row in rows) for s in ("folded", "kept", "none")}
    return (
        f"{len(rows)} {what}: {len(traced)} traced, {len(exact)} exact, "
        f"{sum(row.wrong for row in traced)} wrong; {sum(r.sites for r in rows)} norms: "
        f"{states['folded']} gains folded, {states['kept']} kept, {states['none']} norms without; "
        f"largest float64 error {max((r.error or 0.0) for r in rows):.1e}; of "
        f"{sum(r.refused_gains for r in rows)} refused gains, "
        f"{sum(r.refusals_needed for r in rows)} change an output when folded all the same"
        f"{_others(rows)}."
    )


# Refusals that no forced fold can test on the inputs at hand, by words of their reason.
UNTESTED = {"was not reached": "in doubt for a parameter not reached", "nothing that": "not read"}


def _others(rows: list[Row]) -> str:
    """What the refusals are that change no output."""
    kinds: Counter[str] = Counter()
    for row in rows:
        for gain in row.unneeded:
            reason = row.reasons.get(gain.rpartition(".")[0], "")
            kind = next((k for words, k in UNTESTED.items() if words in reason), "without effect")
            kinds[kind] += 1
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f" (the others: {found})" if found else ""


def _table(rows: list[Row]) -> list[str]:
    rule = "|---" * (HEAD.count("|") - 1) + "|"
    return [HEAD, rule, *map(_table_row, rows)]


def _table_row(row: Row) -> str:
    if row.error is None:
        return f"| {row.name} | {row.model} " + "| " * 11 + f"{row.cause} |"
    gain = [row.count("gain", state) for state in ("folded", "kept", "none")]
    cells = [row.name, row.model, _states(row, "kind"), *gain]
    cells += [_states(row, state) for state in ("bias", "centering", "scale")]
    cells += [f"{row.error:.1e}", f"{row.noise:.1e}", f"{row.refusals_needed}/{row.refused_gains}"]
    return "| " + " | ".join(map(str, [*cells, _why(row)])) + " |"


def _states(row: Row, state: str) -> str:
    found = row.states.get(state, {})
    return ", ".join(f"{n} {value}" for value, n in sorted(found.items()) if value != "none")


def _why(row: Row) -> str:
    reasons = Counter(map(_short, row.reasons.values()))
    why = "; ".join(f"{count}× {reason}" for reason, count in reasons.items())
    return why + ("" if row.default_inputs else " (traced on its own inputs only)")


def _short(reason: str) -> str:
    """The reason without the names of parameters, modules and files; the JSON has it whole."""
    reason = re.sub(r" in '[^']*' at [\w.]+:\d+", "", re.sub(r" \([^()]* at .*$", "", reason))
    return re.sub(r"\b\w+(\.\w+)+\b", "…", reason)


def _uncovered(rows: list[Row]) -> list[str]:
    """Every type without a figure, by the kind of its cause."""
    missing = [row for row in rows if row.group != "variant" and not row.sites]
    by_kind: dict[str, list[Row]] = {}
    for row in missing:
        by_kind.setdefault(row.category, []).append(row)
    lines = []
    for kind, found in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        lines += [f"### {len(found)}: {kind}", ""]
        lines += [f"- {row.name}: {_first(row.cause)}" for row in found] + [""]
    return lines


def _first(cause: str) -> str:
    return " ".join(cause.split(" | ")[0].split())[:200].replace("|", "/")


def line(row: Row) -> str:
    """One line of progress."""
    if row.error is None:
        return f"{row.name:36s} {row.seconds:6.1f} s  {row.category}: {_first(row.cause)[:100]}"
    flag = "  WRONG" if row.wrong else "" if row.exact else "  NOISE"
    gain = [row.count("gain", state) for state in ("folded", "kept", "none")]
    return (
        f"{row.name:36s} {row.seconds:6.1f} s  norms {row.sites:3d} folded {gain[0]:3d} kept "
        f"{gain[1]:3d} none {gain[2]:3d} error {row.error:.1e} noise {row.noise:.1e} needed "
        f"{row.refusals_needed}/{row.refused_gains}{flag}"
    )
