"""Tied weights: whose reading is whose, and which copies untying takes."""

from __future__ import annotations

from collections.abc import Iterable

from flashnorm.graph.flow import Flow
from flashnorm.graph.ir import Graph, Node


def names_of(graph: Graph, name: str) -> tuple[str, ...]:
    """All names of a parameter, the first one first."""
    return next(names for names in graph.aliases.values() if name in names)


def owned(graph: Graph, name: str, node: Node) -> str:
    """The one name of a parameter that the reading module holds itself; empty where it holds none
    or several, and which of them is read cannot be told."""
    own = [alias for alias in names_of(graph, name) if alias.rpartition(".")[0] == node.path]
    return own[0] if len(own) == 1 else ""


def can_be_untied(flow: Flow, name: str) -> bool:
    """Whether it is known of every reading of a parameter by which of its names it is read."""
    nodes = [use.node for use in flow.uses.get(name, ())]
    nodes += [gain.norm_call.node for gain in flow.gains if gain.parameter == name]
    return all(owned(flow.graph, name, node) for node in nodes)


def copies(graph: Graph, changed: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(new, the one it is copied from): what must be untied so that these names alone change.

    The first name keeps the tensor. Where it changes, every other gets a copy; else those that do.
    """
    changed, found = set(changed), []
    for first, names in graph.aliases.items():
        others = names[1:] if first in changed else [n for n in names[1:] if n in changed]
        found += [(name, first) for name in others if _is_registered_first(graph, name)]
    return tuple(sorted(found))


def _is_registered_first(graph: Graph, name: str) -> bool:
    """Whether the module that holds it is not another path of one that was named before."""
    path = name.rpartition(".")[0]
    return graph.modules.get(path, path) == path
