"""Which parameters absorb which gain elements, once every reading of them is known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flashnorm.graph.flow import Flow, Use
from flashnorm.graph.gain_index import NONE
from flashnorm.graph.ties import can_be_untied, copies, names_of, owned
from flashnorm.plan import Consumer, Span

PACKED = (
    "its reader {} is quantized ({}): a gain per input channel does not fit its scales; the norm "
    "is deferred into it by accelerate_"
)
_UNTOUCHED = -2
_FOLDABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Column:
    """What every position of one axis of a parameter must absorb, and the reading that said so."""

    axis: int
    indices: Tensor
    node: str


def absorb(
    flow: Flow, untie: bool
) -> tuple[dict[str, list[Consumer]], tuple[tuple[str, str], ...]]:
    """The consumers of every gain parameter, and the tied parameters that need a copy.

    Refuses, in `flow.refused`, every gain that some reading of a consumer does not allow.
    """
    columns: dict[str, Column] = {}
    for name, uses in _by_alias(flow, untie).items():
        if (column := _column(flow, name, uses)) is not None:
            columns[name] = column
    consumers: dict[str, list[Consumer]] = defaultdict(list)
    for name, column in columns.items():
        for gain in flow.gains_in(column.indices):
            consumers[gain].append(Consumer(name, column.axis, _spans(flow, gain, column.indices)))
    used = {c.parameter for g, found in consumers.items() if g not in flow.refused for c in found}
    parted = [n for n in used if untie and can_be_untied(flow, names_of(flow.graph, n)[0])]
    return consumers, copies(flow.graph, parted)


def _by_alias(flow: Flow, untie: bool) -> dict[str, list[Use]]:
    """Uses by parameter; with `untie`, by the one of its names that the reading module owns, if
    that is known of all."""
    as_gains = defaultdict(list)
    for gain in flow.gains:
        as_gains[gain.parameter].append(Use(gain.norm_call.node, other=True))
    uses = {name: found + as_gains[name] for name, found in flow.uses.items()}
    if not untie:
        return uses
    split: dict[str, list[Use]] = defaultdict(list)
    for name, found in uses.items():
        parts = can_be_untied(flow, name)
        for use in found:
            split[owned(flow.graph, name, use.node) if parts else name].append(use)
    return split


def _column(flow: Flow, name: str, uses: Iterable[Use]) -> Column | None:
    """Put all readings of one parameter together; None if no gain reaches it."""
    uses = list(uses)
    absorbing = [use for use in uses if use.indices is not None]
    if not absorbing:
        return None
    axis = absorbing[0].axis
    assert axis is not None
    held = flow.graph.values[flow.graph.parameters[names_of(flow.graph, name)[0]]]
    size, dtype = held.shape[axis], held.dtype
    if (origin := flow.graph.packed.get(names_of(flow.graph, name)[0])) is not None:
        for use in absorbing:
            assert use.indices is not None
            flow.refuse(use.indices, PACKED.format(name, origin))
    column = Column(axis, torch.full((size,), _UNTOUCHED), absorbing[0].node.where)
    # What absorbs comes first, so that every other reading is held against all of it.
    for use in sorted(uses, key=lambda use: use.indices is None):
        _read(flow, name, column, use)
    if dtype not in _FOLDABLE:
        flow.refuse(
            column.indices,
            f"its reader {name} is quantized ({dtype}): a gain per input "
            "channel does not fit its scales; fold before quantizing",
        )
    return column


def _read(flow: Flow, name: str, column: Column, use: Use) -> None:
    """Enter one reading; refuse the gains of this and of earlier readings where they differ."""
    if use.other or (use.indices is not None and use.axis != column.axis):
        _refuse_all(flow, column.indices, use.indices, _other_reason(flow, name, use))
        return
    if use.indices is None:
        indices = torch.full_like(column.indices, NONE)
        positions = torch.arange(len(column.indices))
    else:
        assert use.positions is not None
        indices, positions = use.indices.clamp(min=NONE), use.positions
    before = column.indices[positions]
    clash = (before != _UNTOUCHED) & (before != indices)
    if bool(clash.any()):
        _refuse_all(flow, before[clash], indices[clash], _clash_reason(flow, name, column, use))
    column.indices[positions] = torch.where(clash, before, indices)


def _refuse_all(flow: Flow, first: Tensor, second: Tensor | None, reason: str) -> None:
    flow.refuse(first, reason)
    if second is not None:
        flow.refuse(second, reason)


def _other_reason(flow: Flow, name: str, use: Use) -> str:
    names = names_of(flow.graph, name)
    if len(names) > 1 or use.node.op == "embedding":
        return (
            f"its reader {names[-1]} is tied to {names[0]}, which is also read by "
            f"{use.node.where}; untie it (--untie) to fold"
        )
    return f"its reader {name} is also read by {use.node.where}"


def _clash_reason(flow: Flow, name: str, column: Column, use: Use) -> str:
    if use.indices is None or not flow.gains_in(column.indices):
        return (
            f"its reader {name} also multiplies a value that is not this norm's output "
            f"({use.node.where if use.indices is None else column.node})"
        )
    gains = sorted({*flow.gains_in(column.indices), *flow.gains_in(use.indices)})
    return f"its reader {name} is read by several norms: {', '.join(gains)} ({use.node.where})"


def _spans(flow: Flow, gain: str, indices: Tensor) -> tuple[Span, ...]:
    """Runs of positions that carry consecutive elements of one gain."""
    base = flow.base(gain)
    size = flow.numel(gain)
    elements = torch.where((indices >= base) & (indices < base + size), indices - base, -2)
    spans: list[Span] = []
    breaks = (elements[1:] != elements[:-1] + 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(elements)]
    for start, stop in pairwise(edges):
        first = int(elements[start])
        if first >= 0:
            spans.append(Span(start, first, stop - start))
    return tuple(spans)
