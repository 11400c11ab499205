"""vLLM's compiled graphs with norm + linear as one call of our operator, for decode steps on GPUs.

    mm(rms(x), Wᵀ)          ->  norm_linear(x, W)
    mm(rms(x + r), Wᵀ) + c  ->  norm_linear(s, W, c),  s = x + r

A graph is as Inductor's last passes see it: ATen operations that write nothing, vLLM's own norms,
and operators that say what they write. A norm goes into all of its readers, or stays. x + r is
rounded to the dtype of x first, as in transformers. Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from flashnorm.engines.graph_writes import Writes, name_of
from flashnorm.engines.vllm_spelling import (
    ADD_RMS,
    ATEN_META,
    RMS,
    Norm,
    erase_unread,
    norms_of,
    tensor_of,
    value_of,
)
from flashnorm.kernels import ops

MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
NEW = ("aten.mm", "aten.addmm", "aten.add", "aten.mul", "aten.cat", RMS, ADD_RMS)


class Reader(NamedTuple):
    """z Wᵀ + c, by the node that computes it. weight: of W, [k, n]; bias: of c, or None."""

    node: Node
    weight: Node
    bias: Any


def take_over_(graph: Graph) -> int:
    """Rewrite a graph in place; how many products have a norm inside now."""
    writes = Writes(graph, lambda node: name_of(node) in NEW)
    planned = [(norm, _readers(norm, writes)) for norm in norms_of(graph)]
    for norm, readers in planned:
        if readers:
            source = _source(graph, norm)
            for reader in readers:
                _replace(graph, norm, source, reader)
    if taken := sum(len(readers) for _, readers in planned):
        erase_unread(graph)
        graph.lint()
    return taken


def _readers(norm: Norm, writes: Writes) -> list[Reader]:
    """The products that read a norm, if nobody else does, and x is still the same there."""
    found = [_reader(user, norm.normed) for user in (norm.normed.users if norm.normed else ())]
    read: Any = norm.total if norm.added else norm.node.args[0]
    if not all(found) or (norm.gain is not None and tensor_of(norm.gain) is None):
        return []
    readers = [reader for reader in found if reader is not None]
    kept = (read is None or writes.keeps(read, norm.node, each.node) for each in readers)
    return readers if all(kept) else []


def _reader(node: Node, z: Node | None) -> Reader | None:
    """A product of rows z with the transpose of a weight as it is held."""
    if node.kwargs or node.target not in (MM, ADDMM):
        return None
    bias, left, right = (None, *node.args) if node.target is MM else node.args
    held = _transposed(right)
    weight = tensor_of(held)
    if left is not z or weight is None or weight.dim() != 2 or not weight.is_contiguous():
        return None
    if bias is not None and (tensor_of(bias) is None or value_of(bias).shape != weight.shape[:1]):
        return None
    return Reader(node, held, bias) if weight.dtype == value_of(node).dtype else None


def _transposed(node: Any) -> Any:
    """W of a node that is Wᵀ; None for anything else."""
    name = name_of(node) if isinstance(node, Node) else ""
    if name == "aten.t" or (name == "aten.permute" and list(node.args[1]) == [1, 0]):
        return node.args[0]
    return None


def _source(graph: Graph, norm: Norm) -> Any:
    """x, or x + r computed by itself."""
    if not norm.added:
        return norm.node.args[0]
    x, added = norm.node.args[:2]
    with graph.inserting_before(norm.node):
        total = graph.call_function(torch.ops.aten.add.Tensor, (x, added))
    total.meta[ATEN_META] = value_of(x)
    if norm.total is not None:
        norm.total.replace_all_uses_with(total)
    return total


def _replace(graph: Graph, norm: Norm, source: Node, reader: Reader) -> None:
    """Our operator in the place of a product."""
    none = (None,) * 5
    about = (norm.kind.name, norm.eps, norm.gain, 0.0)
    with graph.inserting_before(reader.node):
        call = graph.call_function(
            ops.operator, (source, [reader.weight], [reader.bias], *about, *none)
        )
        y = graph.call_function(operator.getitem, (call, 0))
    y.meta[ATEN_META] = value_of(reader.node)
    call.meta[ATEN_META] = [value_of(reader.node)]
    reader.node.replace_all_uses_with(y)
    graph.erase_node(reader.node)
