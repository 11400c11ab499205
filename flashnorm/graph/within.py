"""What happens within one call of a module, and whether that is its result and nothing beside it.

A kernel gives the result alone. So whatever else a module did (counted, asked for a value, wrote
into what it was given) makes it one that has to run itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from flashnorm.graph.ir import Call, Graph, Node, refs
from flashnorm.graph.operations import MOVES
from flashnorm.graph.sites import SAME

# Casts to these lose nothing that the kernels, which compute in float32, would keep.
WIDE = frozenset({torch.float32, torch.float64})
# Of the operations that change no element, those that give memory of its own.
COPIES = frozenset({"clone", "_to_copy", "repeat", "flip"})


class Within:
    """The operations of a graph by the module calls that they belong to."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._of: dict[int, list[int]] = defaultdict(list)
        for index, node in enumerate(graph.nodes):
            self._of[node.call].append(index)

    def nodes(self, number: int) -> list[int]:
        """The operations of a call and of the calls inside it, by index."""
        path, found = self.graph.calls[number].path, list(self._of[number])
        inside, inner = f"{path}." if path else "", number + 1
        while (call := self.graph.calls.get(inner)) and call.path and call.path.startswith(inside):
            found += self._of[inner]
            inner += 1
        return found

    def is_pure(self, number: int) -> bool:
        """Whether a call does nothing but compute what it returns, at no less precision."""
        call, nodes = self.graph.calls[number], self.nodes(number)
        own = [self.graph.nodes[index] for index in nodes]
        behind = self._behind(call)
        for index, node in zip(nodes, own, strict=True):
            if index not in behind and (node.inputs or node.outputs):
                return False
        return all(
            self._writes_own(node, call, nodes) and self._is_wide(node, call) for node in own
        )

    def _behind(self, call: Call) -> set[int]:
        """The operations that the returned values are made by, from those received on."""
        found: set[int] = set()
        waiting = list(call.returned)
        while waiting:
            value = waiting.pop()
            index = self.graph.values[value].node
            if index >= 0 and index not in found and value not in call.received:
                found.add(index)
                waiting += self.graph.nodes[index].inputs
        return found

    def _is_wide(self, node: Node, call: Call) -> bool:
        given = {self.graph.values[value].dtype for value in call.received}
        made = {self.graph.values[value].dtype for value in node.outputs}
        return all(dtype in WIDE | given for dtype in made if dtype.is_floating_point)

    def _writes_own(self, node: Node, call: Call, nodes: list[int]) -> bool:
        """Whether what an operation writes in place is memory that this call has made."""
        return all(self._maker(value, call) in nodes for value in _written(node))

    def _maker(self, value: int, call: Call) -> int:
        """The operation that made the memory of a value; -1 where it came from outside."""
        while value not in call.received and (node := self.graph.producer(value)) is not None:
            if node.op not in SAME | MOVES or node.op in COPIES:
                written = list(_written(node))
                if not written:
                    return self.graph.values[value].node
                value = written[0]
            else:
                value = node.inputs[0]
        return -1


def _written(node: Node) -> Iterator[int]:
    """The values whose memory an operation writes."""
    schema = getattr(node.func, "_schema", None)
    if schema is None:  # a write through an alias: whose it is was not followed
        yield from node.inputs
        return
    named = node.bound
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from refs(named[argument.name])
