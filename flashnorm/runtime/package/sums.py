"""Residuals of a traced step, added by the products before them.

    product(x, W) + r  ->  product(x, W, residual=r)        one kernel instead of two

The product moves to where the sum was, which is allowed where nothing is written on the way; what
is rounded twice by the model, as a product and as a sum, is rounded once.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from flashnorm.kernels.backend import Packaging
from flashnorm.runtime.fusing import Order, summands


def take_up_(graph: Graph, packaging: Packaging) -> int:
    """Rewrite a graph in place; how many sums were taken up."""
    order = Order(graph)
    return sum(_take_up(graph, order, node, packaging) for node in order.nodes)


def _take_up(graph: Graph, order: Order, total: Node, packaging: Packaging) -> bool:
    """Have one of two products that are added compute the sum."""
    a, b = summands(total) or (None, None)
    for product, base in ((b, a), (a, b)):
        if product is None or base is None or (made := _adding(product, base, packaging)) is None:
            continue
        # What was made before in the place of another sum has no place of its own.
        place = order.place.get(product)
        if place is None or not order.is_clear(place, order.place[total]):
            continue
        with graph.inserting_before(total):
            call = graph.call_function(product.target, made)  # type: ignore[arg-type]
        call.meta = dict(total.meta)
        total.replace_all_uses_with(call)
        graph.erase_node(total)
        graph.erase_node(product)
        return True
    return False


def _adding(product: Node, base: Node, packaging: Packaging) -> tuple[Any, ...] | None:
    """The arguments of a product that adds `base`; None where that is no call of ours alone."""
    if product.op != "call_function" or product.kwargs or len(product.users) != 1:
        return None
    return packaging.adding(product.target, product.args, base)
