"""What `accelerate_` did as a person reads it: alike modules in one row, like `inspect`'s table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flashnorm.patterns import families, joined, merged, relative, skeleton
from flashnorm.runtime.build import Part

KINDS = ("norm", "gated", "linear")
HEADER = ("module", "kind", "runs on", "together with, or why not")
KERNEL, OWN = "kernel", "own code"
WIDEST = 64  # columns that a path may take from the rest of its row


@dataclass(frozen=True)
class Row:
    """Modules that are alike but for the numbers in their paths, and their siblings.

    `words` are what a norm computes for its readers, the norm that computes a reader, or the
    reason for which the modules run their own code.
    """

    path: str
    count: int
    kind: str
    state: str
    words: str


def rows(parts: Sequence[Part]) -> list[Row]:
    """The rows of all parts: kernels first, norms before what reads them."""
    norms = {name: part.path for part in parts for name in part.precomputed}
    groups: dict[object, list[Part]] = defaultdict(list)
    for part in sorted(parts, key=lambda part: (bool(part.reason), KINDS.index(part.kind))):
        beside = tuple(dict.fromkeys(skeleton(name) for name in _beside(part, norms)))
        groups[part.kind, skeleton(part.reason), beside].append(part)
    return [row for group in groups.values() for row in _rows(group, norms)]


def _rows(group: Sequence[Part], norms: dict[str, str]) -> Iterator[Row]:
    first = group[0]
    words = joined(name for part in group for name in _beside(part, norms))
    words = merged([part.reason for part in group]) or words
    for path, count in families(part.path or "(the model itself)" for part in group):
        yield Row(path, count, first.kind, OWN if first.reason else KERNEL, words)


def _beside(part: Part, norms: dict[str, str]) -> list[str]:
    """What one call computes with this module, as it is named in the block that holds both."""
    names = part.precomputed or ([norms[part.path]] if part.path in norms else [])
    return [relative(name, part.path) for name in names]


def summary(
    parts: Sequence[Part],
    kernels: str,
    attention: str,
    folded: bool,
    training: Sequence[Part],
    experts: str | None = None,
    package: str = "",
    captures: str = "",
) -> str:
    """The fields of an `Acceleration` in some lines, however many layers there are."""
    found, first = rows(parts), f"{_done(parts)} modules run on {kernels}"
    if parts and all(part.reason == kernels for part in parts):
        first = f"no module runs on kernels: {kernels}"
        found = [replace(row, words="") for row in found]
    lines = [first if parts else "no norm and no linear layer was found"]
    lines.append(f"attention of single tokens runs on {_where(attention)}")
    if experts is not None:
        lines.append(f"experts of few tokens run on {_where(experts)}")
    if folded:
        lines.append("the gains were folded first")
    if package:
        lines.append(f"decode steps are compiled: {package}")
    if captures:
        lines.append(f"decode steps are captured: {captures}")
    lines += _table(found)
    if training:
        lines += ["", f"in training {_done(training)} modules save less: {_kinds(training)}"]
        lines += _table(rows([part for part in training if part.reason]))
    return "\n".join(lines)


def _where(reason: str) -> str:
    return f"its own code: {reason}" if reason else "a kernel"


def _done(parts: Sequence[Part]) -> str:
    return f"{sum(not part.reason for part in parts)} of {len(parts)}"


def _kinds(parts: Sequence[Part]) -> str:
    done = Counter(part.kind for part in parts if not part.reason)
    return ", ".join(f"{done[kind]} {kind}" for kind in KINDS if done[kind]) or "none"


def _table(found: Sequence[Row]) -> list[str]:
    if not found:
        return []
    cells = [HEADER]
    for row in found:
        path = f"{row.path} ×{row.count}" if row.count > 1 else row.path
        cells.append((path, row.kind, row.state, row.words))
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*cells, strict=True)][:-1]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]])
        for line in cells
    ]
    return ["", *(line.rstrip() for line in lines)]
