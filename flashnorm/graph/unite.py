"""Several recordings of one model as one graph: what any of them reads, the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flashnorm.graph.ir import Call, Graph, Node, Ref, substitute


def united(graphs: Sequence[Graph]) -> Graph:
    """One graph of all passes. A parameter is the same value in all of them."""
    first, *others = graphs
    for graph in others:
        _append(first, graph)
    return first


def _append(into: Graph, graph: Graph) -> None:
    nodes, calls = len(into.nodes), max(into.calls, default=0)
    numbers: dict[int, int] = {}
    for number, held in enumerate(graph.values):
        if held.origin == "parameter":
            numbers[number] = into.parameters[held.parameter]
            continue
        numbers[number] = len(into.values)
        node = held.node if held.node < 0 else held.node + nodes
        into.values.append(replace(held, node=node))
    into.nodes += [_moved(node, numbers, calls) for node in graph.nodes]
    read = {value for node in graph.nodes for value in node.inputs}
    # A buffer that any of the passes reads is read, whichever value stands for it.
    into.buffers |= {name: numbers[v] for name, v in graph.buffers.items() if v in read}
    into.outputs |= {numbers[value] for value in graph.outputs}
    into.notes += [note for note in graph.notes if note not in into.notes]
    into.packed |= graph.packed
    for number, call in graph.calls.items():
        given, made = ([numbers[v] for v in held] for held in (call.received, call.returned))
        into.calls[number + calls] = Call(call.path, tuple(given), call.arguments, tuple(made))


def _moved(node: Node, numbers: dict[int, int], calls: int) -> Node:
    def ref(value: int) -> Ref:
        return Ref(numbers[value])

    return replace(
        node,
        args=substitute(node.args, ref),
        kwargs={key: substitute(item, ref) for key, item in node.kwargs.items()},
        outputs=tuple(numbers[value] for value in node.outputs),
        call=node.call + calls if node.call else 0,
    )
