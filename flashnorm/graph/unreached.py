"""Parameters that the recorded passes did not read, and the gains that this leaves in doubt.

A cold expert or an unused head may read a norm's output all the same. A gain is in doubt where its
labelled values are visible to the code that owns the unread module: they enter it from outside, or
pass between its parts.
"""

from __future__ import annotations

from flashnorm.graph.flow import Flow


def refuse_unreached(flow: Flow) -> tuple[str, ...]:
    """Refuse the gains in doubt; returns the names of all parameters that were not read."""
    graph = flow.graph
    read = {value for node in graph.nodes for value in node.inputs}
    unread = [name for name, value in graph.parameters.items() if value not in read]
    active = _with_ancestors({node.path for node in graph.nodes})
    suspects: dict[str, str] = {}
    for name in unread:
        if len(graph.values[graph.parameters[name]].shape) >= 2:
            suspects.setdefault(_owner(name, active), name)
    for owner, name in suspects.items():
        for gain, paths in flow.touched.items():
            if _is_visible(paths, owner):
                flow.refused.setdefault(
                    gain, f"{name} was not reached by the recorded passes and may read it"
                )
    return tuple(unread)


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
    prefix = f"{owner}." if owner else ""
    inside = {path for path in touched if path == owner or path.startswith(prefix)}
    if not inside:
        return False
    parts = {path[len(prefix) :].split(".")[0] for path in inside}
    return owner in inside or len(parts) > 1 or inside != touched
