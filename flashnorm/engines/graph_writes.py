"""Who writes to which tensor in a traced graph whose operations may write.

A tensor is followed back to the memory that it may be a view of, its homes: an operation that is
not known to make new memory may return a view of any of its arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

NEW_MEMORY = (torch.empty, torch.empty_like)
OPERATORS = type(torch.ops.aten.add.Tensor), type(torch.ops.aten.add)  # one overload, or all
FUNCTIONS = FunctionType, BuiltinFunctionType, type


def name_of(node: Node) -> str:
    """The name of the operator that a node calls, like `aten.mm`; empty for anything else."""
    if node.op != "call_function" or not isinstance(node.target, OPERATORS):
        return ""
    return ".".join(str(node.target).split(".")[:2])


class Writes:
    """The order of a graph's nodes, and what is written between them.

    is_new(node): whether an operation is known to return memory of its own.
    """

    def __init__(self, graph: Graph, is_new: Callable[[Node], bool]) -> None:
        self._nodes = list(graph.nodes)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._homes: dict[Node, frozenset[Node]] = {}
        for node in self._nodes:
            self._homes[node] = self._found(node, is_new)
        self._written = {n: found for n in self._nodes if (found := _written(n)) != []}

    def is_before(self, first: Node, last: Node) -> bool:
        """Whether a node is computed before another one."""
        return self._place[first] < self._place[last]

    def keeps(self, tensor: Node, first: Node, last: Node) -> bool:
        """Whether a tensor is the same at two nodes, by what the nodes from one to the other do.

        The first one counts, the last one does not.
        """
        homes = self._homes[tensor]
        between = self._nodes[self._place[first] : self._place[last]]
        return not any(self._may_write(node, homes) for node in between)

    def is_untouched(self, tensor: Node, before: Node) -> bool:
        """Whether nobody reads or writes a tensor before a node does."""
        return all(self._place[user] >= self._place[before] for user in tensor.users)

    def _found(self, node: Node, is_new: Callable[[Node], bool]) -> frozenset[Node]:
        if not node.all_input_nodes or node.target in NEW_MEMORY or is_new(node):
            return frozenset((node,))
        return frozenset().union(*(self._homes[each] for each in node.all_input_nodes))

    def _may_write(self, node: Node, homes: frozenset[Node]) -> bool:
        written = self._written.get(node, [])
        return written is None or any(self._homes[each] & homes for each in written)


def _written(node: Node) -> list[Node] | None:
    """The arguments that a node may write to; None where that is not known."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if name_of(node):
        return list(_by_schema(node))
    if node.op == "call_method":
        name = str(node.target)
    elif isinstance(node.target, FUNCTIONS):
        name = node.target.__name__
    else:
        return None
    found: list[Node] = []
    map_arg(node.kwargs.get("out"), found.append)
    if _is_in_place(name) or _is_told_to(node):
        map_arg(node.args[:1] or tuple(node.kwargs.values()), found.append)
    return found


def _is_told_to(node: Node) -> bool:
    """Whether a function has an argument `inplace`, and is given anything but False."""
    if not isinstance(node.target, FunctionType):
        return bool(node.kwargs.get("inplace"))
    names = list(inspect.signature(node.target).parameters)
    if "inplace" not in names:
        return False
    at = names.index("inplace")
    value = node.args[at] if at < len(node.args) else node.kwargs.get("inplace", False)
    return value is not False


def _is_in_place(name: str) -> bool:
    """Whether a function of this name writes to its first argument: add_, setitem, iadd."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "setitem" or name in _IN_PLACE


_NAMES = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_IN_PLACE = frozenset(f"i{name}" for name in _NAMES)


def _by_schema(node: Node) -> Iterator[Node]:
    """What the schema of an operator, or any of its overloads, says that it writes to."""
    target: Any = node.target
    one = isinstance(target, OPERATORS[0])
    overloads = [target] if one else [getattr(target, each) for each in target.overloads()]
    for overload in overloads:
        for at, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = node.args[at] if at < len(node.args) else node.kwargs.get(argument.name)
            nodes: list[Node] = []
            map_arg(value, nodes.append)
            yield from nodes
