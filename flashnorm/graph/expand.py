"""Operations that are several at once, written out, so that a gain is a product by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashnorm.graph.ir import Graph, Node, Ref, Value

_ATEN = torch.ops.aten


def expanded(graph: Graph) -> Graph:
    """The graph with `b + x ⊙ g`, and the gains and biases of norms over groups, as operations."""
    if not any(node.op in _EXPANSIONS for node in graph.nodes):
        return graph
    values, nodes = list(graph.values), list[Node]()
    for node in graph.nodes:
        expand = _EXPANSIONS.get(node.op)
        nodes += (expand(_Writer(values, node)) if expand else None) or [node]
    for index, node in enumerate(nodes):
        for out in node.outputs:
            values[out] = replace(values[out], node=index)
    return replace(graph, values=values, nodes=nodes)


@dataclass
class _Writer:
    """Writes operations in the place of one."""

    values: list[Value]
    node: Node

    def write(self, func: Any, args: tuple[Any, ...], like: int, out: int | None = None) -> Node:
        """An operation whose output is `out`, or a new value shaped like `like`."""
        if out is None:
            out = len(self.values)
            self.values.append(replace(self.values[like], origin="computed", parameter=""))
        name = func._schema.name.split("::")[-1]
        return replace(self.node, op=name, func=func, args=args, kwargs={}, outputs=(out,))

    def per_channel(self, parameter: int, ndim: int) -> Node:
        """[C] as [C, 1, ..], beside channels that are the second axis of `ndim`."""
        shape = [*self.values[parameter].shape, *[1] * (ndim - 2)]
        node = self.write(_ATEN.view.default, (Ref(parameter), shape), parameter)
        self.values[node.outputs[0]] = replace(self.values[node.outputs[0]], shape=tuple(shape))
        return node


def _sum_of_product(product: Any) -> Callable[[_Writer], list[Node] | None]:
    def expand(writer: _Writer) -> list[Node] | None:
        named, out = writer.node.bound, writer.node.outputs[0]
        if named["value"] != 1:
            return None
        sides = named["tensor1"], named["tensor2"]
        first = writer.write(product, sides, out)
        shape = torch.broadcast_shapes(*(writer.values[side.value].shape for side in sides))
        made = first.outputs[0]
        writer.values[made] = replace(writer.values[made], shape=tuple(shape))
        added = (named["self"], Ref(made))
        return [first, writer.write(_ATEN.add.Tensor, added, out, out)]

    return expand


def _affine(writer: _Writer) -> list[Node] | None:
    """A norm without gain and bias, and then these."""
    node, named = writer.node, writer.node.bound
    gain, bias = named.get("weight"), named.get("bias")
    if not isinstance(gain, Ref) and not isinstance(bias, Ref):
        return None
    positions = [a.name for a in node.func._schema.arguments]  # type: ignore[attr-defined]
    bare = {**named, "weight": None, "bias": None}
    out = node.outputs[0]
    norm = writer.write(node.func, tuple(bare[name] for name in positions), out)
    norm = replace(norm, op=node.op, outputs=(norm.outputs[0], *node.outputs[1:]))
    ndim, nodes, last = len(writer.values[out].shape), [norm], norm.outputs[0]
    both = (_ATEN.mul.Tensor, gain), (_ATEN.add.Tensor, bias)
    steps = [(func, item) for func, item in both if isinstance(item, Ref)]
    for number, (func, item) in enumerate(steps, 1):
        view = writer.per_channel(item.value, ndim)
        end = out if number == len(steps) else None
        step = writer.write(func, (Ref(last), Ref(view.outputs[0])), out, end)
        nodes, last = [*nodes, view, step], step.outputs[0]
    return nodes


_EXPANSIONS: dict[str, Callable[[_Writer], list[Node] | None]] = {
    "addcmul": _sum_of_product(_ATEN.mul.Tensor),
    "addcdiv": _sum_of_product(_ATEN.div.Tensor),
    **dict.fromkeys(
        ("native_group_norm", "group_norm", "native_batch_norm", "instance_norm"), _affine
    ),
}
