"""Graphs of a compiler, with the residual added in the product that comes before it.

    norm_linear(x, W) + r  ->  norm_linear(x, W, output_residual=r)        one call instead of two
    norm_linear(x, W_1), norm_linear(x, W_2)  ->  norm_linear(x, [W_1, W_2])

The graphs are those after AOTAutograd: ATen operations, which write to nothing but for those that
say so. No layer is known here, only our operator. A call moves past operations that write to
nothing, whatever they are; past one that writes, or of which that is not known (higher-order
operations, calls of modules), none moves. All edits of a kind are planned before the first is made.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from flashnorm.kernels import dispatch, ops
from flashnorm.kernels.call import Call

WEIGHTS, BIASES, ACTIVATION, RESIDUAL = map(
    Call._fields.index, ("weights", "biases", "activation", "output_residual")
)
ADD = torch.ops.aten.add.Tensor
OPERATION = type(ADD)
STRIDES = "eager_input_vals"  # under this name a node keeps tensors like its arguments
# What is computed with lists and with shapes.
NAMES = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "lt", "le")
PLAIN = frozenset(getattr(operator, name) for name in NAMES)


def fuse_(graph: Graph) -> int:
    """Rewrite a graph in place where that is proven; how many operations were saved."""
    if not any(map(is_ours, graph.nodes)):
        return 0
    saved = sum(edit.apply(graph) for edit in list(_sums(Order(graph))))
    # A group may be placed before a call that is in another one: so they are made one by one.
    while (group := next(_groups(Order(graph)), None)) is not None:
        saved += group.apply(graph)
    return saved


def is_ours(node: Node) -> bool:
    """Whether a node calls our operator, with every argument in its place."""
    ours = node.op == "call_function" and node.target is ops.operator
    return ours and not node.kwargs and len(node.args) == len(Call._fields)


class Order:
    """The order of a graph's nodes, and between which of them something may be written."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = list(graph.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self._writers = list(accumulate((not _is_pure(n) for n in self.nodes), initial=0))

    def is_clear(self, first: int, last: int) -> bool:
        """Whether nothing from one place to another may write to a tensor."""
        return self._writers[first] == self._writers[last + 1]


def _is_pure(node: Node) -> bool:
    """Whether a node is known to write to no tensor."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    target = node.target
    return not target._schema.is_mutable if isinstance(target, OPERATION) else target in PLAIN


class Sum(NamedTuple):
    """`base + Σ products`, of which every product can take what is before it as its residual.

    adds: from the outermost to the innermost; items: the results of the products.
    """

    adds: Sequence[Node]
    items: Sequence[Node]
    base: Node

    def apply(self, graph: Graph) -> int:
        """Let the products add. A base that is a sum itself is edited after this one."""
        total, before = self.adds[0], self.base
        with graph.inserting_before(total):
            for item in self.items:
                call = item.args[0]
                assert isinstance(call, Node)
                arguments = [*call.args]
                arguments[RESIDUAL] = before
                before = _call(graph, arguments, [total], call)[0]
        total.replace_all_uses_with(before)
        calls = [item.args[0] for item in self.items]
        for node in (*self.adds, *self.items, *calls):
            graph.erase_node(node)  # type: ignore[arg-type]
        return len(self.adds)


def _sums(order: Order) -> Iterator[Sum]:
    """The sums of a graph that products can take over, the last ones first."""
    taken: set[Node] = set()
    for node in reversed(order.nodes):
        if node in taken or (found := _sum(order, node)) is None:
            continue
        first = min(order.place[item.args[0]] for item in found.items)
        if order.is_clear(first, order.place[node]):
            taken.update(found.adds)
            yield found


def _sum(order: Order, total: Node) -> Sum | None:
    """A sum whose terms are products and at most one other, as deep as that holds."""
    for deep in (True, False):
        adds: list[Node] = []
        terms = list(_terms(total, adds, deep))
        items = sorted((term for term in terms if _adds(term)), key=order.place.__getitem__)
        rest = [term for term in terms if term not in items]
        if len(rest) > 1 or not adds:
            continue
        base = rest[0] if rest else items.pop(0)
        return Sum(adds, items, base) if items else None
    return None


def _terms(node: Node, adds: list[Node], deep: bool) -> Iterator[Node]:
    """What a node is the sum of, through sums that nobody else reads."""
    operands = summands(node) if not adds or (deep and len(node.users) == 1) else None
    if operands is None:
        yield node
        return
    adds.append(node)
    for operand in operands:
        yield from _terms(operand, adds, deep)


def summands(node: Node) -> tuple[Node, Node] | None:
    """a and b of a node that is a + b, where all three are dense and alike."""
    if node.op != "call_function" or node.target is not ADD or len(node.args) != 2:
        return None
    if node.kwargs not in ({}, {"alpha": 1}):
        return None
    a, b = node.args
    if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
        return None
    return (a, b) if _alike(a, node) and _alike(b, node) else None


def _alike(node: Node, other: Node) -> bool:
    """Whether two results have one shape, which is known, one dtype, and no gaps."""
    a, b = (n.meta.get("val") for n in (node, other))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if not all(isinstance(size, int) for size in (*a.shape, *b.shape)):
        return False
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, torch.strided):
        return False
    return b.layout == torch.strided and a.is_contiguous() and b.is_contiguous()


def _adds(item: Node) -> bool:
    """Whether this is all that is read of a call of ours, once, and the call can add a residual."""
    if item.op != "call_function" or item.target is not operator.getitem or len(item.users) != 1:
        return False
    call = item.args[0]
    if not isinstance(call, Node) or not is_ours(call) or len(call.users) != 1:
        return False
    results = 1 if call.args[ACTIVATION] is not None else len(_list(call, WEIGHTS))
    return results == 1 and call.args[RESIDUAL] is None and _is_wanted(call)


def _is_wanted(call: Node) -> bool:
    """Whether the backend of a call wants graphs to be rewritten."""
    x = _value(call.args[0])
    return x is not None and dispatch.backend_of(x).compiled.fuses


def _value(node: Any) -> Tensor | None:
    """The tensor without memory that stands for a node's result."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, Tensor) else None


def _list(call: Node, which: int) -> list[Any]:
    """An argument that is a list, whatever kind of list the graph holds."""
    return list(call.args[which])  # type: ignore[arg-type]


def _call(graph: Graph, arguments: Sequence[Any], like: Sequence[Node], old: Node) -> list[Node]:
    """A call of ours in the place of an old one, whose results are like those of other nodes."""
    call = graph.call_function(ops.operator, tuple(arguments))
    call.meta = {**old.meta, "val": [node.meta["val"] for node in like]}
    if STRIDES in old.meta:  # Inductor takes as many arguments as these are
        call.meta[STRIDES] = (map_arg(call.args, lambda node: node.meta["val"]), {})
    results = []
    for place, node in enumerate(like):
        item = graph.call_function(operator.getitem, (call, place))
        item.meta = dict(node.meta)
        results.append(item)
    return results


class Group(NamedTuple):
    """Calls that differ in their weights alone, to be made as one before a node."""

    calls: Sequence[Node]
    before: Node

    def apply(self, graph: Graph) -> int:
        first, items = self.calls[0], [_items(call) for call in self.calls]
        arguments = [*first.args]
        arguments[WEIGHTS] = [w for call in self.calls for w in _list(call, WEIGHTS)]
        arguments[BIASES] = [b for call in self.calls for b in _list(call, BIASES)]
        every = [item for found in items for item in found]
        with graph.inserting_before(self.before):
            made = _call(graph, arguments, every, first)
        for old, new in zip(every, made, strict=True):
            old.replace_all_uses_with(new)
        for node in (*every, *self.calls):
            graph.erase_node(node)
        return len(self.calls) - 1


def _groups(order: Order) -> Iterator[Group]:
    """The calls of a graph that one call can stand for."""
    alike: dict[Any, list[Node]] = defaultdict(list)
    for node in order.nodes:
        if is_ours(node) and _joins(node):
            rest = [node.args[at] for at in range(len(node.args)) if at not in (WEIGHTS, BIASES)]
            alike[tuple(rest)].append(node)
    for calls in alike.values():
        yield from _split(order, calls)


def _split(order: Order, calls: Sequence[Node]) -> Iterator[Group]:
    """Groups of calls with one x, as large as the order and the backend allow."""
    left = list(calls)
    while left:
        group, left = [left[0]], left[1:]
        found: Group | None = None
        for call in list(left):
            if (larger := _group(order, [*group, call])) is not None:
                found = larger
                group.append(call)
                left.remove(call)
        if found is not None:
            yield found


def _group(order: Order, calls: Sequence[Node]) -> Group | None:
    """The calls as one, before whoever reads a result first; None where that is not possible."""
    x = _value(calls[0].args[0])
    assert x is not None
    if sum(len(_list(call, WEIGHTS)) for call in calls) > dispatch.backend_of(x).limits.weights:
        return None
    readers = [user for call in calls for item in _items(call) for user in item.users]
    place = min(order.place[reader] for reader in readers)
    given = [node for call in calls for node in call.all_input_nodes]
    if any(order.place[node] >= place for node in given):
        return None
    places = [place, *(order.place[call] for call in calls)]
    return Group(calls, order.nodes[place]) if order.is_clear(min(places), max(places)) else None


def _items(call: Node) -> list[Node]:
    """The nodes of a call's results, in their order; each is there (`_joins`)."""
    return sorted(call.users, key=lambda item: item.args[1])  # type: ignore[arg-type, return-value]


def _joins(call: Node) -> bool:
    """Whether a call's weights can stand in one with those of others."""
    weights = _list(call, WEIGHTS)
    if call.args[ACTIVATION] is not None or call.args[RESIDUAL] is not None:
        return False
    if call.args[BIASES] is None or not _is_wanted(call):
        return False
    if not all(_has_dense_rows(_value(weight)) for weight in weights):
        return False  # those that are held as [in, out] go by themselves
    items = [user for user in call.users if user.target is operator.getitem and user.users]
    read = [item.args[1] for item in items]
    return len(items) == len(call.users) and sorted(read) == list(range(len(weights)))  # type: ignore[type-var]


def _has_dense_rows(weight: Tensor | None) -> bool:
    if weight is None or not isinstance(step := weight.stride(1), int):
        return False
    return step == 1
