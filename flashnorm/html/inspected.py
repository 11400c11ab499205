"""The page of a plan: what happens to every norm, drawn from the input to the output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from flashnorm.html.blocks import ROOT, Badge, Block, Chip, Row, Tip, blocks, cycles, inside
from flashnorm.html.page import Page
from flashnorm.patterns import joined, merged, relative, skeleton
from flashnorm.plan import Consumer, Plan, ScaledReader, Site
from flashnorm.report import further, totals

LABELS = {"folded": "folded", "kept": "kept", "none": "no gain"}
WEIGHT = ".weight"
# What is said of states other than the usual ones, and how it looks.
BADGES = {
    ("bias", "folded"): Badge("bias folded", "folded"),
    ("bias", "carried"): Badge("bias stays as β/g", "other"),
    ("bias", "kept"): Badge("bias kept", "kept"),
    ("centering", "folded"): Badge("mean not needed", "centered"),
    ("centering", "kept"): Badge("mean kept", "kept"),
    ("scale", "partial"): Badge("scale undone in part", "cancelled"),
    ("scale", "cancelled"): Badge("scale undone", "cancelled"),
}
TAKEN_OUT = Badge("scale taken out", "cancelled")
PACKED = Badge("readers are packed", "other")
PLACES = {
    "output": "s goes onto its output",
    "later": "s goes onto the output of {}",
    "nowhere": "it needs no s: other norms undo it",
}


def page(plan: Plan, title: str) -> Page:
    """What `flashnorm inspect` says, as a page."""
    found = totals(plan)
    state = "good" if found.folded == found.norms else "part"
    verdict = f"{found.folded} of {found.norms} norms fold"
    if not plan.sites:
        state, verdict = "part", "no normalization was found"
    elements = f"{found.folded_elements:,} of {found.elements:,} gain elements become one."
    lines = [elements, *(f"{line}." for line in further(plan))] if plan.sites else []
    drawn = _Rows(plan)
    return Page(
        "inspect",
        title or "a model",
        verdict,
        state,
        tuple(lines),
        "inspected.jinja",
        {
            "cycles": cycles(blocks(plan.sites, lambda s: s.path), drawn.likeness, drawn),
            "shares": _shares(plan),
            "reasons": [("kept", *each) for each in found.kept]
            + [("none", *each) for each in found.none],
            "remarks": _remarks(plan),
            "sites": [_cells(site) for site in plan.sites],
        },
    )


class _Rows:
    """The norms of alike blocks, those that are alike in one row.

    Alike are norms that differ in nothing but numbers in paths: what is said of one holds for all.
    """

    def __init__(self, plan: Plan) -> None:
        self.taken_out = {cancelling.path for cancelling in plan.cancellings}

    def likeness(self, found: Block) -> object:
        """Equal for blocks that may be drawn as one."""
        return skeleton(found.path), tuple(map(self._likeness, found.items))

    def _likeness(self, site: object) -> object:
        assert isinstance(site, Site)
        return skeleton(repr(site)), site.path in self.taken_out

    def __call__(self, found: Sequence[Block]) -> list[Row]:
        groups: dict[object, list[tuple[str, Site]]] = defaultdict(list)
        for each in found:
            for site in each.items:
                assert isinstance(site, Site)
                groups[self._likeness(site)].append((each.path, site))
        return [self._row(pairs, len(found)) for pairs in groups.values()]

    def _row(self, pairs: Sequence[tuple[str, Site]], of: int) -> Row:
        sites = [site for _, site in pairs]
        first = sites[0]
        eps = "" if first.eps is None else f" · ε {first.eps:.3g}"
        names = [("(itself)" if s.path == where else inside(s.path, where)) for where, s in pairs]
        return Row(
            name=merged(names) or ROOT,
            count=len(sites) // of,
            state=first.gain_state,
            label=LABELS[first.gain_state],
            meta=f"{first.kind} · {first.width}{eps}",
            badges=tuple(self._badges(first)),
            chips=tuple(_chips(pairs)),
            words=merged([site.reason for site in sites]),
            tip=_tip(sites),
        )

    def _badges(self, site: Site) -> list[Badge]:
        found = [BADGES.get((name, getattr(site, name))) for name in ("bias", "centering", "scale")]
        found.append(TAKEN_OUT if site.path in self.taken_out else None)
        found.append(PACKED if site.quantized else None)
        return [badge for badge in found if badge]


def _tip(sites: Sequence[Site]) -> Tip:
    """What is said of a norm at its place; empty terms are left out."""
    first = sites[0]
    undone = joined(relative(norm.path, site.path) for site in sites for norm in site.renorms)
    terms = {
        "norm": merged([site.path for site in sites]) or ROOT,
        "gain": _gain(sites),
        "why not": merged([site.reason for site in sites]),
        "bias": _state(sites, "bias", "bias_reason"),
        "mean": _state(sites, "centering", "centering_reason"),
        "scale": _state(sites, "scale", "scale_reason"),
        "undone by": undone,
        "packed": joined(relative(n, site.path) for site in sites for n in site.quantized),
        "source": first.source,
    }
    return tuple((term, words) for term, words in terms.items() if words)


def _gain(sites: Sequence[Site]) -> str:
    gain = sites[0].gain
    if gain is None:
        return ""
    name = merged([site.gain.parameter for site in sites if site.gain])
    if (gain.offset, gain.scale) == (0, 1):
        return name
    return f"{gain.offset:g} + {gain.scale:g} · {name}"


def _state(sites: Sequence[Site], name: str, reason: str) -> str:
    """A state and its reason; nothing where there is nothing to be said."""
    state = getattr(sites[0], name)
    reasons = [getattr(site, reason) for site in sites]
    why = merged(reasons)
    if name == "scale" and state != "kept":
        return f"{state}, no further: {why}" if why else state
    return "" if state == "none" else ": ".join(filter(None, [state, why]))


def _chips(found: Sequence[tuple[str, Site]]) -> list[Chip]:
    """Whoever reads a norm's output: those that absorb its gain, and those that take its scale."""
    absorbing: dict[str, list[Consumer]] = defaultdict(list)
    scaled: dict[str, ScaledReader] = {}
    names: dict[str, list[str]] = defaultdict(list)
    for where, site in found:
        called = _names(site, where)
        for name in called.values():
            names[skeleton(name)].append(name)
        for consumer in site.consumers:
            absorbing[skeleton(called[consumer.parameter])].append(consumer)
        for reader in site.readers:
            scaled.setdefault(skeleton(called[reader.parameter]), reader)
    return [_chip(names[key], absorbing.get(key, []), scaled.get(key)) for key in names]


def _names(site: Site, where: str) -> dict[str, str]:
    """The readers' parameters, as they are called in their block.

    A tied weight has its owner's name; the module that reads it says more.
    """
    modules = {reader.parameter: reader.path for reader in site.readers if reader.path}
    found = [c.parameter for c in site.consumers] + [r.parameter for r in site.readers]
    return {name: inside(modules.get(name, name.removesuffix(WEIGHT)), where) for name in found}


def _chip(names: list[str], absorbing: Sequence[Consumer], scaled: ScaledReader | None) -> Chip:
    tip: list[tuple[str, str]] = []
    marks = []
    if absorbing:
        first = absorbing[0]
        marks.append("g")
        tip.append(("weight", merged([consumer.parameter for consumer in absorbing])))
        tip.append(("gain", f"goes into it along axis {first.axis}, {_columns(first)}"))
        if first.bias:
            marks.append("β")
            tip.append(("bias", f"W β goes into {merged([c.bias for c in absorbing])}"))
    if scaled is not None:
        marks += ["s"] if scaled.place != "nowhere" else []
        tip.append(("scale", _scale(scaled)))
    return Chip(merged(names), "folded" if absorbing else "none", tuple(marks), tuple(tip))


def _columns(consumer: Consumer) -> str:
    spans = [f"{span.start} to {span.start + span.length - 1}" for span in consumer.spans[:4]]
    more = f" and {len(consumer.spans) - 4} more" if len(consumer.spans) > 4 else ""
    return f"elements {', '.join(spans)}{more}"


def _scale(reader: ScaledReader) -> str:
    after = relative(reader.after.removesuffix(WEIGHT), reader.parameter)
    cost = f", {reader.multiplies:,} multiplications per row" if reader.multiplies else ""
    return f"may wait: {PLACES[reader.place].format(after)}{cost}"


def _shares(plan: Plan) -> list[tuple[str, str, int]]:
    """State, label and count of the norms, for the bar under the verdict."""
    counts = [
        (state, label, sum(site.gain_state == state for site in plan.sites))
        for state, label in LABELS.items()
    ]
    return [each for each in counts if each[2]]


def _remarks(plan: Plan) -> list[str]:
    lines = [f"{new} gets a copy of {old} of its own" for new, old in plan.untied]
    lines += plan.notes
    if plan.unreached:
        lines.append(
            f"not reached by the recorded passes: {len(plan.unreached)} parameters, the first is "
            f"{plan.unreached[0]}"
        )
    return lines


def _cells(site: Site) -> dict[str, object]:
    """One norm for the table that has them all."""
    into = joined(relative(c.parameter.removesuffix(WEIGHT), site.path) for c in site.consumers)
    return {
        "path": site.path or ROOT,
        "kind": site.kind,
        "width": f"{site.width:,}",
        "eps": "–" if site.eps is None else f"{site.eps:.3g}",
        "state": site.gain_state,
        "label": LABELS[site.gain_state],
        "into": into,
        "reason": site.reason,
        "further": [
            (name, _state([site], field, f"{field}_reason"))
            for name, field in (("bias", "bias"), ("mean", "centering"), ("scale", "scale"))
            if _state([site], field, f"{field}_reason")
        ],
        "source": site.source,
    }
