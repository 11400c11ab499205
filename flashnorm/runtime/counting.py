"""Counters of a graph that go up by the same number, raised together: one kernel, not one of each.

A static cache counts its tokens in every layer, on the device, and a compiler writes a kernel for
each: `copy_(counter, counter + 1)` becomes a part of `_foreach_add_([counter, ..], 1)`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from flashnorm.compat.torch_names import add_to_each

ADD, COPY, ALL = torch.ops.aten.add.Tensor, torch.ops.aten.copy_.default, add_to_each


class Raise(NamedTuple):
    """One counter, an argument of the graph; what is added to it; where that is written back."""

    counter: Node
    add: Node
    copy: Node


def count_(graph: Graph) -> int:
    """Raise counters of a graph together, in place; how many operations were saved."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    alike: dict[object, list[Raise]] = defaultdict(list)
    for node in graph.nodes:
        if (found := _raise(node)) is not None:
            value = found.counter.meta["val"]
            alike[value.dtype, value.device, value.shape, found.add.args[1]].append(found)
    return sum(_together(graph, group, place) for group in alike.values())


def _raise(copy: Node) -> Raise | None:
    """A write of an argument of one number with itself plus a constant, which nobody else reads."""
    if copy.op != "call_function" or copy.target is not COPY or copy.users or copy.kwargs:
        return None
    if len(copy.args) != 2:
        return None
    counter, add = copy.args
    if not isinstance(counter, Node) or counter.op != "placeholder" or not isinstance(add, Node):
        return None
    if add.op != "call_function" or add.target is not ADD or len(add.users) != 1 or add.kwargs:
        return None
    if len(add.args) != 2 or add.args[0] is not counter or not isinstance(add.args[1], int):
        return None
    value = counter.meta.get("val")
    known = isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
    return Raise(counter, add, copy) if known else None


def _together(graph: Graph, group: Sequence[Raise], place: dict[Node, int]) -> int:
    """Raise these where the first of them is written, if all that reads them comes before."""
    first = min(place[each.copy] for each in group)
    group = [each for each in group if _is_read_before(each, first, place)]
    if len(group) < 2:
        return 0
    before = min((each.copy for each in group), key=place.__getitem__)
    with graph.inserting_before(before):
        graph.call_function(ALL, ([each.counter for each in group], group[0].add.args[1]))
    for each in group:
        graph.erase_node(each.copy)
        graph.erase_node(each.add)
    return len(group) - 1


def _is_read_before(one: Raise, first: int, place: dict[Node, int]) -> bool:
    """Whether nothing reads a counter or a view of it from a place on, and nothing else writes."""
    left, seen = [one.counter], {one.add, one.copy}
    while left:
        for user in left.pop().users:
            if user in seen:
                continue
            seen.add(user)
            schema = getattr(user.target, "_schema", None)
            if user.op != "call_function" or schema is None or schema.is_mutable:
                return False
            if place[user] >= first:
                return False
            if any(result.alias_info is not None for result in schema.returns):
                left.append(user)
    return True
