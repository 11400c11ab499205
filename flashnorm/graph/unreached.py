"""What the recorded passes did not read, and the gains that this leaves in doubt.

A cold expert or an unused head may read a norm's output all the same; the norm of another modality,
or another row of a bank of gains, may stand before the same linear layer. Whatever could do so for
another input is a doubt, and a doubt refuses. Inputs that reach it settle it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from flashnorm.graph.flow import Flow
from flashnorm.graph.reads import is_whole

UNREAD = "{} was not reached by the recorded passes and may {}; inputs that reach it settle it"
IN_PART = "{} was read in part by the recorded passes; inputs that reach the rest settle it"
ELSEWHERE = (
    "its reader {} is also {}, in a part of the model that the recorded passes did not reach; "
    "inputs that reach it settle it"
)


def refuse_unreached(flow: Flow, untie: bool) -> tuple[str, ...]:
    """Refuse the gains in doubt; returns the names of all parameters that were not read."""
    graph = flow.graph
    read = {value for node in graph.nodes for value in node.inputs}
    unread = {name: v for name, v in graph.parameters.items() if not flow.reads.get(name)}
    buffers = {name: value for name, value in graph.buffers.items() if value not in read}
    active = _with_ancestors(
        {node.path for node in graph.nodes} | {call.path for call in graph.calls.values()}
    )
    for gain, paths in flow.touched.items():
        for name, what in _suspects(flow, gain, unread, buffers):
            if _is_visible(paths, _owner(name, active)):
                flow.refused.setdefault(gain, UNREAD.format(name, what))
                break
    _refuse_parts(flow)
    _refuse_elsewhere(flow, active, untie)
    return tuple(unread)


def _suspects(
    flow: Flow, gain: str, unread: dict[str, int], buffers: dict[str, int]
) -> Iterator[tuple[str, str]]:
    """What could read values with this gain, or stand in its place, by its shape."""
    width = flow.numel(gain)
    for name, value in unread.items():
        shape = flow.graph.values[value].shape
        if len(shape) >= 2:
            yield name, "read it"
        elif _fits(prod(shape), width):
            yield name, "take its place"
    for name, value in buffers.items():
        held = flow.graph.values[value]
        if held.dtype.is_floating_point and prod(held.shape) == width > 1:
            yield name, "take its place"


def _fits(size: int, width: int) -> bool:
    """Whether a vector can multiply values that a gain of this width multiplies."""
    return size > 1 and (width % size == 0 or size % width == 0)


def _refuse_parts(flow: Flow) -> None:
    """Gains, biases of norms and readers that other inputs may use other parts of."""
    for name in dict.fromkeys(use.parameter for use in flow.gains):
        if not is_whole(flow.reads[name]):
            flow.refused.setdefault(name, IN_PART.format(f"the gain {name}"))
    for gain, shifts in flow.shifts.items():
        for name in dict.fromkeys(shift.parameter for shift in shifts):
            if not is_whole(flow.reads[name]):
                flow.refused.setdefault(gain, IN_PART.format(f"its bias {name}"))
    for name, uses in flow.uses.items():
        absorbing = [use.labels for use in uses if use.labels is not None]
        if absorbing and not is_whole(flow.reads[name]):
            for labels in absorbing:
                flow.refuse(labels, IN_PART.format(f"its reader {name}"))


def _refuse_elsewhere(flow: Flow, active: set[str], untie: bool) -> None:
    """Readers that are also a part of a module that did not run, and may get another value there.

    With `untie` a weight that modules of their own share is given to each of them.
    """
    for name, uses in flow.uses.items():
        absorbing = [use.labels for use in uses if use.labels is not None]
        names = flow.graph.aliases[name]
        for alias in names if absorbing and len(names) > 1 else ():
            own = alias.rpartition(".")[0]
            holder = _holder(flow, own)
            if holder not in active and not (untie and holder == own):
                for labels in absorbing:
                    flow.refuse(labels, ELSEWHERE.format(name, alias))


def _holder(flow: Flow, path: str) -> str:
    """The innermost module around a path that is registered there first and so is itself."""
    while flow.graph.modules.get(path, path) != path:
        path = path.rpartition(".")[0]
    return path


def _with_ancestors(paths: set[str]) -> set[str]:
    found = {""}
    for path in paths:
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _owner(name: str, active: set[str]) -> str:
    """The nearest module around a parameter in which anything ran."""
    path = name.rpartition(".")[0]
    while path not in active:
        path = path.rpartition(".")[0]
    return path


def _is_visible(touched: set[str], owner: str) -> bool:
    """Whether labelled values enter a module from outside, or pass between its parts."""
    prefix = f"{owner}." if owner else ""
    inside = {path for path in touched if path == owner or path.startswith(prefix)}
    if not inside:
        return False
    parts = {path[len(prefix) :].split(".")[0] for path in inside}
    return owner in inside or len(parts) > 1 or inside != touched
