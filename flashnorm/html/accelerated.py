"""The page of an acceleration: what runs on kernels, and what one call computes together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from flashnorm.html.blocks import ROOT, Block, Chip, Row, blocks, cycles, inside
from flashnorm.html.page import Page
from flashnorm.patterns import block, joined, merged, relative, skeleton
from flashnorm.runtime.accelerate import Acceleration, Part
from flashnorm.runtime.summary import KINDS

LABELS = {"kernel": "kernel", "own": "own code"}


def page(found: Acceleration, title: str) -> Page:
    """What `flashnorm.acceleration(model)` says, as a page."""
    done, count = len(found.fused), len(found.parts)
    verdict = f"{done} of {count} modules run on kernels"
    if not found.parts:
        verdict = "no norm and no linear layer was found"
    together = {name: part.path for part in found.parts for name in part.precomputed}
    return Page(
        "acceleration",
        title or "a model",
        verdict,
        "good" if count and done == count else "part",
        tuple(_lines(found)),
        "accelerated.jinja",
        {
            "cycles": cycles(blocks(_ordered(found.parts), _path), _alike, _Rows(together)),
            "shares": _shares(found.parts),
            "reasons": _reasons(found.parts),
            "parts": [_cells(part, together) for part in _ordered(found.parts)],
            "training": [_cells(part, {}) for part in found.training],
        },
    )


def _lines(found: Acceleration) -> list[str]:
    lines = [
        f"Kernels: {found.kernels}.",
        f"Attention of single tokens: {_where(found.attention)}.",
    ]
    if found.experts is not None:
        lines.append(f"Experts of few tokens: {_where(found.experts)}.")
    if found.folded:
        lines.append("The gains were folded first.")
    if found.package:
        lines.append(f"Decode steps are compiled: {found.package}.")
    if found.captures:
        lines.append(f"Decode steps are captured: {found.captures}.")
    if found.training:
        done = sum(not part.reason for part in found.training)
        lines.append(f"In training {done} of {len(found.training)} modules save less.")
    return lines


def _where(reason: str) -> str:
    return f"its own code, because {reason}" if reason else "a kernel"


def _path(part: Part) -> str:
    return part.path


def _ordered(parts: Sequence[Part]) -> list[Part]:
    """By block, norms before what reads them; modules outside of all layers come last."""
    first: dict[str, int] = {}
    for at, part in enumerate(parts):
        first.setdefault(block(part.path), at)
    return sorted(parts, key=lambda part: _place(part, first))


def _place(part: Part, first: dict[str, int]) -> tuple[object, ...]:
    where = block(part.path)
    outside = not any(piece.isdecimal() for piece in where.split("."))
    return outside, (KINDS.index(part.kind) if outside else 0), first[where], KINDS.index(part.kind)


def _alike(found: Block) -> object:
    parts = [part for part in found.items if isinstance(part, Part)]
    return skeleton(found.path), tuple(_likeness(part, found.path) for part in parts)


def _likeness(part: Part, where: str) -> object:
    readers = tuple(skeleton(relative(name, part.path)) for name in part.precomputed)
    return part.kind, skeleton(inside(part.path, where)), skeleton(part.reason), readers


class _Rows:
    """The modules of alike blocks: a norm with its readers, then the others by kind and reason."""

    def __init__(self, together: dict[str, str]) -> None:
        self.together = together

    def __call__(self, found: Sequence[Block]) -> list[Row]:
        groups: dict[object, list[tuple[str, Part]]] = defaultdict(list)
        for each in found:
            for part in each.items:
                assert isinstance(part, Part)
                if part.path in self.together and not part.reason:
                    continue  # it is drawn with its norm
                alike = _likeness(part, each.path)
                key = alike if part.precomputed else (part.kind, skeleton(part.reason))
                groups[key].append((each.path, part))
        return [self._row(pairs, len(found)) for pairs in groups.values()]

    def _row(self, pairs: Sequence[tuple[str, Part]], of: int) -> Row:
        parts = [part for _, part in pairs]
        state = "own" if parts[0].reason else "kernel"
        names = [inside(part.path, where) or ROOT for where, part in pairs]
        return Row(
            name=joined(names),
            count=len(parts) // of,
            state=state,
            label=LABELS[state],
            meta=parts[0].kind,
            chips=tuple(_chips(pairs)),
            words=merged([part.reason for part in parts]) or _alone(parts[0]),
            tip=(("module", joined(part.path or ROOT for part in parts)),),
        )


def _alone(part: Part) -> str:
    return "" if part.precomputed else "called by itself"


def _chips(pairs: Sequence[tuple[str, Part]]) -> list[Chip]:
    """What the call of a norm computes too."""
    names: dict[str, list[str]] = defaultdict(list)
    for where, part in pairs:
        for name in part.precomputed:
            short = inside(name, where)
            names[skeleton(short)].append(name if short == name else short)
    return [Chip(merged(each), "folded") for each in names.values()]


def _shares(parts: Sequence[Part]) -> list[tuple[str, str, int]]:
    own = sum(bool(part.reason) for part in parts)
    counts = {"kernel": len(parts) - own, "own": own}
    return [
        (state, f"on {'kernels' if state == 'kernel' else 'their own code'}", count)
        for state, count in counts.items()
        if count
    ]


def _reasons(parts: Sequence[Part]) -> list[tuple[str, int]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        if part.reason:
            groups[skeleton(part.reason)].append(part.reason)
    return [(merged(reasons), len(reasons)) for reasons in groups.values()]


def _cells(part: Part, together: dict[str, str]) -> dict[str, str]:
    words = part.reason
    if not words and part.precomputed:
        words = f"computes {joined(relative(name, part.path) for name in part.precomputed)}"
    elif not words and part.path in together:
        words = f"computed by {relative(together[part.path], part.path)}"
    state = "own" if part.reason else "kernel"
    return {
        "path": part.path or ROOT,
        "kind": part.kind,
        "state": state,
        "label": LABELS[state],
        "words": words,
    }
