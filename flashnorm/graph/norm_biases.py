"""The biases of norms: which of them move with their gain, and which the readers can take (E2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from flashnorm.graph.flow import Flow, Use
from flashnorm.graph.ties import names_of
from flashnorm.plan import Consumer

NO_SLOT = "its reader {} has no bias of its own that could take it"


def find_norm_biases(flow: Flow) -> dict[str, str]:
    """The bias of every gain that has one. Refuses gains whose bias cannot move with them."""
    owners: dict[str, set[str]] = defaultdict(set)
    for gain, uses in flow.norm_biases.items():
        for use in uses:
            owners[use.parameter].add(gain)
    found = {}
    for gain, uses in flow.norm_biases.items():
        names = list(dict.fromkeys(use.parameter for use in uses))
        nodes = {id(use.node) for use in uses}
        if reason := _reason(flow, gain, names, nodes, owners):
            flow.refused.setdefault(gain, reason)
        else:
            found[gain] = names[0]
    return found


def _reason(
    flow: Flow, gain: str, names: list[str], nodes: set[int], owners: dict[str, set[str]]
) -> str:
    if len(names) > 1:
        return f"several biases are added to it: {', '.join(names)}"
    if flow.numel(names[0]) != flow.numel(gain):
        return f"its bias {names[0]} has not as many elements as the gain"
    if len(owners[names[0]]) > 1:
        return f"its bias {names[0]} also belongs to other gains"
    others = [use for use in flow.uses.get(names[0], ()) if id(use.node) not in nodes]
    if others:
        return f"its bias {names[0]} is also read by {others[0].node.where}"
    return ""


def find_slots(flow: Flow, gain: str, consumers: Iterable[Consumer]) -> tuple[dict[str, str], str]:
    """For every reader of a gain the bias that takes `W β`; else a reason why E2 does not apply."""
    slots: dict[str, str] = {}
    nodes: set[int] = set()
    for consumer in consumers:
        uses = _absorbing(flow, gain, consumer.parameter)
        names = {use.slot for use in uses}
        if len(names) != 1 or "" in names:
            return {}, NO_SLOT.format(consumer.parameter)
        slots[consumer.parameter] = names.pop()
        nodes |= {id(use.node) for use in uses}
    for slot in slots.values():
        if len(flow.graph.aliases[slot]) > 1 or slot in flow.bases:
            return {}, f"the bias {slot} is tied or is a gain itself"
        if others := [use for use in flow.uses[slot] if id(use.node) not in nodes]:
            return {}, f"the bias {slot} is also read by {others[0].node.where}"
    return slots, ""


def _absorbing(flow: Flow, gain: str, parameter: str) -> list[Use]:
    """The readings of a parameter, under any of its names, that carry elements of this gain."""
    uses = flow.uses[names_of(flow.graph, parameter)[0]]
    return [use for use in uses if use.indices is not None and gain in flow.gains_in(use.indices)]
