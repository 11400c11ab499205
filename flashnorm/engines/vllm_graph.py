"""vLLM's traced graphs with norm + linear as one call, for the steps of few tokens on CPUs.

    linear(norm(x))                ->  norm_linear(x)
    norm(linear(y) + r)            ->  norm(s),  s = linear(y) + r in one call
    act(a[.., :k]) ⊙ a[.., k:]     ->  a GLU in one call,  a = linear(..)

Some nodes of such a graph write into tensors. A call of ours stands where the product stood, and
takes over what was computed before only if nobody writes to that in between. What `vllm_spelling`
does not read word for word stays as it is. Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from flashnorm.engines.graph_writes import Writes, name_of
from flashnorm.engines.vllm_spelling import (
    ADD_RMS,
    META,
    RMS,
    Glu,
    Norm,
    Product,
    alike,
    erase_unread,
    glu_of,
    leading,
    norms_of,
    products_of,
    rows_of,
    shaped_like,
    views_of,
)
from flashnorm.kernels import norms
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import operators


def fuse_(module: GraphModule, weights: Mapping[Node, Tensor], rows: str) -> int:
    """Rewrite a graph in place; how many products are calls of ours now.

    weights: by the node of a handler, the weight [k, n] that it multiplies with; rows: the symbol
    of the rows that products must have.
    """
    fusion = _Fusion(module, weights, rows)
    if not fusion.products:
        return 0
    fusion.apply()
    erase_unread(module.graph)
    module.graph.lint()
    module.recompile()
    return len(fusion.products)


def norm_product(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm: str,
    eps: float,
    gain: Tensor | None,
    norm_bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`norm(x) Wᵀ + c + residual`, or a GLU of two weights: what stands in a graph.

    x: [.., n], weights: [k, n], biases: [k], gain and norm_bias: [n], residual: [.., k].
    """
    call = Call(
        x.contiguous(),
        weights,
        biases,
        norm=norms.find(norm),
        eps=eps,
        gain=gain,
        norm_bias=norm_bias,
        activation=activation,
        output_residual=None if residual is None else residual.contiguous(),
    )
    return operators.norm_linear(call)[0]


class _Fusion:
    """Which product takes over what; then the calls in their places."""

    def __init__(self, module: GraphModule, weights: Mapping[Node, Tensor], rows: str) -> None:
        self.module, self.graph = module, module.graph
        self.writes = Writes(self.graph, lambda node: name_of(node) in (RMS, ADD_RMS))
        found = products_of(self.graph, weights, self.writes)
        self.products = [p for p in found if rows_of(p.out) == [rows]]
        self.norm_of: dict[Node, Norm] = {}  # by the node of a product: the norm inside of it
        self.sum_of: dict[Node, Norm] = {}  # by the node of a product: the norm it adds r for
        self.sums: list[Norm] = []  # the norms whose x + r is computed by itself
        self.source: dict[Node, Node] = {}  # by the node of a norm: x + r, once it is there

    def apply(self) -> None:
        by_out = {product.out: product for product in self.products}
        for norm in list(norms_of(self.graph)):
            self._plan(norm, by_out)
        for norm in self.sums:
            self._sum(norm)
        for product in self.products:
            self._replace(product)

    def _plan(self, norm: Norm, by_out: Mapping[Node, Product]) -> None:
        """Say which products take over a norm, and the sum before it."""
        x: Any = norm.node.args[0]
        readers = self._readers(norm)
        if x in by_out and norm.added and self._adds(by_out[x], norm):
            self.sum_of[by_out[x].node] = norm
        elif norm.added and readers:
            self.sums.append(norm)
        for product in readers:
            self.norm_of[product.node] = norm

    def _adds(self, product: Product, norm: Norm) -> bool:
        """Whether a sum alone reads a product, and its other part is there before the product."""
        added: Any = norm.node.args[1]
        if set(product.out.users) != {product.node, norm.node} or not alike(added, product.out):
            return False
        there = self.writes.is_before(added, product.node)
        return there and self.writes.keeps(added, product.node, norm.node)

    def _readers(self, norm: Norm) -> list[Product]:
        """The products that read a norm, if nobody else does; else none.

        What the norm reads must still be the same where they stand.
        """
        views = views_of(norm.normed) if norm.normed is not None else []
        users = {user for view in views for user in view.users} - set(views)
        found = [p for p in self.products if p.node in users and p.node.args[1] in views]
        if len(found) != len(users) or any(p.node.args[2] in views for p in found):
            return []
        x: Any = norm.node.args[0]
        if any(leading(x) != leading(product.out) for product in found):
            return []
        read = norm.total if norm.added else x
        kept = (read is None or self.writes.keeps(read, norm.node, p.node) for p in found)
        return found if all(kept) else []

    def _sum(self, norm: Norm) -> None:
        """x + r by itself, before a norm that products take over."""
        x, added = norm.node.args[:2]
        with self.graph.inserting_before(norm.node):
            total = self.graph.call_function(operator.add, (x, added))
        total.meta[META] = x.meta[META]  # type: ignore[union-attr]
        self._summed(norm, total)

    def _summed(self, norm: Norm, total: Node) -> None:
        """Let the readers of x + r read what computes it now."""
        self.source[norm.node] = total
        if norm.total is not None:
            norm.total.replace_all_uses_with(total)

    def _replace(self, product: Product) -> None:
        """Our call in the place of a product."""
        glu, norm = glu_of(product), self.norm_of.get(product.node)
        adding = self.sum_of.get(product.node)
        with self.graph.inserting_before(product.node):
            y = self._call(product, norm, adding, glu)
        instead = product.out if glu is None else glu.node
        y.meta[META] = instead.meta[META]
        self.graph.erase_node(product.node)
        if glu is None and adding is not None:
            self._finish(adding, y)
        instead.replace_all_uses_with(y)

    def _call(
        self, product: Product, norm: Norm | None, adding: Norm | None, glu: Glu | None
    ) -> Node:
        x: Any = shaped_like(product.node.args[1], product.out)
        bias = product.node.args[2]
        if norm is not None:
            x = self.source.get(norm.node) or norm.node.args[0]
        parts = product.weight.chunk(2) if glu else (product.weight,)
        weights = [self._constant(part) for part in parts]
        biases = [bias]
        if glu:
            half = len(parts[0])
            biases = [self._part(bias, slice(at, at + half)) for at in (0, half)]
        kind = norms.NONE if norm is None else norm.kind
        about = (norm.eps, norm.gain, norm.bias) if norm else (0.0, None, None)
        residual = None if adding is None else adding.node.args[1]
        activation = None if glu is None else glu.activation
        arguments = (x, weights, biases, kind.name, *about, activation, residual)
        return self.graph.call_function(norm_product, arguments)

    def _finish(self, norm: Norm, total: Node) -> None:
        """A norm of x + r, whose sum is computed, in the place of one that added."""
        self._summed(norm, total)
        if norm.normed is None:
            return
        with self.graph.inserting_before(norm.node):
            normed = self.graph.call_function(
                torch.ops.vllm_ir.rms_norm.default, (total, norm.gain, norm.eps, None)
            )
        normed.meta[META] = norm.normed.meta[META]
        norm.normed.replace_all_uses_with(normed)

    def _constant(self, tensor: Tensor) -> Node:
        """A tensor of ours as a node."""
        name = f"flashnorm_weight_{len(list(self.module.buffers()))}"
        self.module.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        node.meta[META] = tensor
        return node

    def _part(self, bias: Any, rows: slice) -> Any:
        return None if bias is None else self.graph.call_function(operator.getitem, (bias, rows))
