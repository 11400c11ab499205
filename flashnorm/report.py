"""A plan as a person reads it: a table of norms, alike ones in one row, and what it comes to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from flashnorm.patterns import joined, merged, relative, skeleton
from flashnorm.plan import Plan, Site

COLOURS = {"folded": "green", "kept": "yellow", "none": "dim"}
# Columns that are shown only where some norm has more to say than this.
USUAL = {"bias": "none", "mean": "none", "scale": "kept"}
OTHERS = 62  # columns that a norm's path leaves to the rest of its row


@dataclass(frozen=True)
class Row:
    """Sites that are alike but for the numbers in their paths. `into` are the consumers.

    `mean` is what becomes of a LayerNorm's mean, `scale` of the scale per row.
    """

    path: str
    count: int
    kind: str
    width: int
    eps: float | None
    gain: str
    into: str
    reason: str
    bias: str = "none"
    mean: str = "none"
    scale: str = "kept"


@dataclass(frozen=True)
class Totals:
    """What a plan comes to. Elements are single numbers in gain vectors, shared ones once.

    `kept` and `none` are the reasons of the norms that are not folded, each with its count.
    """

    norms: int
    folded: int
    elements: int
    folded_elements: int
    kept: tuple[tuple[str, int], ...]
    none: tuple[tuple[str, int], ...]


def rows(plan: Plan, *, every: bool = False) -> list[Row]:
    """The rows of a plan in the order of execution; `every=True` gives each site its own."""
    groups: dict[object, list[Site]] = defaultdict(list)
    for place, site in enumerate(plan.sites):
        groups[place if every else _likeness(site)].append(site)
    return [_row(sites) for sites in groups.values()]


def totals(plan: Plan) -> Totals:
    """Count norms, gain elements and reasons."""
    sizes: dict[str, dict[str, int]] = {"folded": {}, "kept": {}, "none": {}}
    for site in plan.sites:
        name = site.gain.parameter if site.gain else site.path
        sizes[site.gain_state][name] = _elements(site)
    folded = sum(sizes["folded"].values())
    kept = sum(sizes["kept"].values())
    return Totals(
        norms=len(plan.sites),
        folded=len(plan.folded),
        elements=folded + kept,
        folded_elements=folded,
        kept=_reasons(plan, "kept"),
        none=_reasons(plan, "none"),
    )


def show(plan: Plan, *, every: bool = False) -> RenderableType:
    """The table of a plan and, below it, the summary."""
    if not plan.sites:
        return Group(Text("no normalization was found"), *_remarks(plan))
    return Group(_Fitted(rows(plan, every=every)), summary(plan))


def summary(plan: Plan) -> RenderableType:
    """What a plan comes to, one line each."""
    found = totals(plan)
    lines = [
        Text(f"{found.folded} of {found.norms} norms fold ({_share(found.folded, found.norms)})"),
        Text(
            f"{found.folded_elements:,} of {found.elements:,} gain elements become one "
            f"({_share(found.folded_elements, found.elements)})"
        ),
    ]
    lines += [Text(line) for line in further(plan)]
    lines += [_titled(f"{n} kept", reason, "yellow") for reason, n in found.kept]
    lines += [_titled(f"{n} without", reason, "dim") for reason, n in found.none]
    return Group(*lines, *_remarks(plan))


def further(plan: Plan) -> list[str]:
    """What becomes of biases, means and scales, where there is something to say."""
    biases, means, scales = (
        Counter(getattr(site, name) for site in plan.sites)
        for name in ("bias", "centering", "scale")
    )
    lines = []
    if biases["folded"] or biases["carried"]:
        lines.append(
            f"{biases['folded']} biases go into the readers' biases, {biases['carried']} stay with "
            f"the norm as β/g, {biases['kept']} are kept"
        )
    if means["folded"] or means["kept"]:
        lines.append(f"{means['folded']} of {means.total() - means['none']} means are not needed")
    if scales["cancelled"] or scales["partial"]:
        lines.append(
            f"{scales['cancelled']} scales are undone by other norms, {scales['partial']} in part"
        )
    if plan.cancellings:
        ignored = all(cancelling.epsilon == "ignore" for cancelling in plan.cancellings)
        how = "with epsilon ignored" if ignored else "for any epsilon"
        lines.append(f"{len(plan.cancellings)} scales are taken out, {how}")
    return lines


def _remarks(plan: Plan) -> list[Text]:
    """What holds for the model as a whole."""
    lines = [
        _titled("untied", f"{new} gets a copy of {old} of its own", "cyan")
        for new, old in plan.untied
    ]
    lines += [_titled("note", note, "cyan") for note in plan.notes]
    if plan.unreached:
        what = f"{len(plan.unreached)} parameters, the first is {plan.unreached[0]}"
        lines.append(_titled("not reached by the recorded passes", what, "yellow"))
    return lines


def _titled(title: str, words: str, style: str) -> Text:
    return Text.assemble((f"{title}: ", style), words)


@dataclass(frozen=True)
class _Fitted:
    """The table as wide as the console lets it be."""

    rows: list[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _table(self.rows, options.max_width)


def _table(found: Sequence[Row], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    longest = max(len(row.path) + 5 for row in found)
    table.add_column("norm", overflow="fold", width=min(longest, max(16, width - OTHERS)))
    table.add_column("kind")
    table.add_column("width", justify="right")
    table.add_column("eps", justify="right")
    table.add_column("gain")
    further = [
        name for name, usual in USUAL.items() if any(getattr(r, name) != usual for r in found)
    ]
    for name in further:
        table.add_column(name)
    table.add_column("goes into, or why not", overflow="fold")
    for row in found:
        table.add_row(
            Text(f"{row.path} ×{row.count}" if row.count > 1 else row.path),
            row.kind,
            str(row.width),
            "–" if row.eps is None else f"{row.eps:.3g}",
            Text(row.gain, style=COLOURS[row.gain.split()[0]]),
            *(getattr(row, name) for name in further),
            Text(row.reason or row.into),
        )
    return table


def _row(sites: list[Site]) -> Row:
    first = sites[0]
    convention = " (1+w)" if first.gain and first.gain.offset == 1 else ""
    return Row(
        path=merged([site.path for site in sites]) or "(the model itself)",
        count=len(sites),
        kind=first.kind,
        width=first.width,
        eps=first.eps,
        gain=first.gain_state + (convention if first.gain_state != "none" else ""),
        into=_into(sites),
        reason=merged([site.reason for site in sites]),
        bias=first.bias,
        mean="centered" if first.centering == "folded" else first.centering,
        scale=first.scale if first.scale in ("partial", "cancelled") else "kept",
    )


def _likeness(site: Site) -> object:
    """Equal for sites that may share a row."""
    gain = replace(site.gain, parameter="") if site.gain else None
    readers = tuple(dict.fromkeys(skeleton(c.parameter) for c in site.consumers))
    texts = skeleton(site.path), skeleton(site.reason)
    states = site.gain_state, site.bias, site.centering, site.scale
    return site.kind, site.width, site.eps, states, gain, readers, texts


def _into(sites: list[Site]) -> str:
    """The consumers, named from the block that they share with the norm, by parent module."""
    return joined(
        relative(consumer.parameter.removesuffix(".weight"), site.path)
        for site in sites
        for consumer in site.consumers
    )


def _reasons(plan: Plan, state: str) -> tuple[tuple[str, int], ...]:
    groups: dict[str, list[str]] = defaultdict(list)
    for site in plan.sites:
        if site.gain_state == state:
            groups[skeleton(site.reason)].append(site.reason)
    return tuple((merged(reasons), len(reasons)) for reasons in groups.values())


def _elements(site: Site) -> int:
    """The length of the gain: its readers say it, else it is taken to be the width."""
    ends = [span.gain_start + span.length for c in site.consumers for span in c.spans]
    return max(ends, default=site.width)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
