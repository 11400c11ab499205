"""What vLLM's traced graphs spell: products, norms and gated pairs, by their nodes.

A graph is as Dynamo traced it: products are `_C.onednn_mm(out, x, bias, handler)`, RMS norms are
vLLM's own operations, and what a node's result is like stands in its meta. Sizes that are open are
compared as they are written, so that nothing is decided about them.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from flashnorm.engines.graph_writes import Writes, name_of
from flashnorm.kernels import norms
from flashnorm.kernels.norms import NormKind
from flashnorm.kernels.weights import DTYPES

PRODUCT, RMS, ADD_RMS = "_C.onednn_mm", "vllm_ir.rms_norm", "vllm_ir.fused_add_rms_norm"
SHAPED = ("view", "reshape", "contiguous")  # methods that give the same numbers in another shape
META, ATEN_META = "example_value", "val"  # where Dynamo and AOTAutograd keep what a result is like


class Product(NamedTuple):
    """out = x Wᵀ + c. node: what computes it; out: the memory; weight: [k, n]."""

    node: Node
    out: Node
    weight: Tensor


class Norm(NamedTuple):
    """norm(x), or norm(x + r) where r is `added`: x and r are the first arguments of the node.

    normed: the node of the result; total: that of x + r; None where nobody reads them.
    """

    node: Node
    kind: NormKind
    added: bool
    gain: Any
    bias: Any
    eps: float
    normed: Node | None
    total: Node | None


class Glu(NamedTuple):
    """act(first half) ⊙ second half of a product, by the node that multiplies."""

    node: Node
    activation: str


def products_of(graph: Graph, weights: Mapping[Node, Tensor], writes: Writes) -> Iterator[Product]:
    """The products of rows of x with weights that are known."""
    for node in graph.nodes:
        if name_of(node) != PRODUCT or node.kwargs or len(node.args) != 4 or node.users:
            continue
        out, x, bias, handler = node.args
        weight = weights.get(handler)
        if weight is None or not _is_rows(out, len(weight)) or not _is_rows(x, weight.shape[1]):
            continue
        base = shaped_like(x, out)
        if base is None or (base is not x and not writes.keeps(base, base, node)):
            continue  # another shape may be a copy, and x written to since
        fits = x.meta[META].dtype == out.meta[META].dtype == weight.dtype
        new = out.target is torch.empty and writes.is_untouched(out, node)
        known = weight.dtype in DTYPES and _is_vector(bias, len(weight), (weight.dtype,))
        if fits and new and known:
            yield Product(node, out, weight)


def norms_of(graph: Graph) -> Iterator[Norm]:
    for node in graph.nodes:
        name = name_of(node)
        if node.target is F.layer_norm and (found := _layer_norm(node)) is not None:
            yield found
        elif name in (RMS, ADD_RMS) and not node.kwargs:
            added = name == ADD_RMS
            gain, eps, part = (*node.args[1 + added :], None)[:3]
            results = _items(node) if added else {0: node}
            x = node.args[0]
            fits = _is_rows(x) and _is_vector(gain, _features(x), DTYPES)
            fits = fits and (not added or alike(x, node.args[1]))  # so that x + r has that dtype
            if part is None and results is not None and fits and isinstance(eps, float):
                normed, total = results.get(0), results.get(1)
                yield Norm(node, norms.RMS, added, gain, None, eps, normed, total)


def _layer_norm(node: Node) -> Norm | None:
    """F.layer_norm over the features of rows."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if not node.args or not _is_rows(node.args[0]):
        return None
    features = _features(node.args[0])
    if given["normalized_shape"] not in ((features,), [features]):
        return None
    gain, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
    fits = all(_is_vector(each, features, DTYPES) for each in (gain, bias))
    if not fits or not isinstance(eps, float):
        return None
    return Norm(node, norms.LAYER, False, gain, bias, eps, node, None)


def glu_of(product: Product) -> Glu | None:
    """What multiplies the two halves of a product, one of them activated, if nobody else reads."""
    halves = set(product.out.users) - {product.node}
    width = len(product.weight)
    first, second = (_half(halves, part) for part in _slices(width))
    if width % 2 or len(halves) != 2 or first is None or second is None:
        return None
    for act in first.users:
        activation, node = _activation(act), next(iter(act.users), None)
        alone = len(first.users) == len(second.users) == len(act.users) == 1
        if not alone or activation is None or node not in second.users or node.kwargs:
            continue
        if node.target in (operator.mul, torch.mul) and set(node.args) == {act, second}:
            return Glu(node, activation)
    return None


def _slices(width: int) -> tuple[list[slice], list[slice]]:
    """The two halves of so many features, as they may be written."""
    half = width // 2
    return [slice(None, half), slice(0, half)], [slice(half, None), slice(half, width)]


def _half(nodes: set[Node], slices: list[slice]) -> Node | None:
    spelled = [(Ellipsis, part) for part in slices]
    found = (n for n in nodes if n.target is operator.getitem and n.args[1] in spelled)
    return next(found, None)


def _activation(node: Node) -> str | None:
    """The name of an activation of one argument, as kernels know it."""
    if len(node.args) != 1:
        return None
    if node.target is F.silu:
        return None if node.kwargs.get("inplace") else "silu"
    if node.target is F.gelu:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"  # torch has two
    return None


def _items(node: Node) -> dict[int, Node] | None:
    """The results of a node by their number; None where it is read in another way."""
    found: dict[int, Node] = {}
    for user in node.users:
        if user.target is not operator.getitem or user.args[1] in found:
            return None
        found[user.args[1]] = user  # type: ignore[index]
    return found


def views_of(node: Node) -> list[Node]:
    """A node and the methods that give the same rows of the same numbers."""
    found = [node]
    for user in node.users:
        shaped = user.op == "call_method" and user.target in SHAPED and user.args[0] is node
        if shaped and rows_of(user) == rows_of(node) and _is_rows(user, _features(node)):
            found += views_of(user)
    return found


def value_of(node: Any) -> Any:
    """What a node's result is like: a tensor without memory, a symbol, or None."""
    if not isinstance(node, Node):
        return None
    return next((node.meta[name] for name in (META, ATEN_META) if name in node.meta), None)


def tensor_of(node: Any) -> Tensor | None:
    found = value_of(node)
    return found if isinstance(found, Tensor) else None


def _is_rows(node: Any, features: int | None = None) -> bool:
    """Whether a node is [.., features], of so many features."""
    value = tensor_of(node)
    if value is None or value.dim() < 2 or not isinstance(value.shape[-1], int):
        return False
    return features is None or value.shape[-1] == features


def _is_vector(node: Any, features: Any, dtypes: Collection[torch.dtype]) -> bool:
    """Whether a node is nothing, or one dense number for each feature, of a dtype among these."""
    value = tensor_of(node)
    if node is None or value is None:
        return node is None
    dense = value.dim() == 1 and value.is_contiguous()
    return dense and value.shape[0] == features and value.dtype in dtypes


def _features(node: Any) -> Any:
    value = tensor_of(node)
    return None if value is None else value.shape[-1]


def leading(node: Any) -> list[str] | None:
    """The sizes of a node's result but for the last one, as they are written."""
    value = tensor_of(node)
    return None if value is None else [str(size) for size in value.shape[:-1]]


def rows_of(node: Any) -> list[str]:
    """Those of them that are not 1."""
    return [size for size in leading(node) or () if size != "1"]


def shaped_like(x: Any, out: Node) -> Node | None:
    """x before it was given another shape, where its rows lie as those of a product; or None."""
    while leading(x) != leading(out):
        shaped = isinstance(x, Node) and x.op == "call_method" and x.target in SHAPED
        if not shaped or rows_of(x) != rows_of(x.args[0]):
            return None
        x = x.args[0]
    return x if isinstance(x, Node) else None


def alike(node: Any, other: Any) -> bool:
    """Whether two results have one shape and one dtype, by what is written and not computed."""
    a, b = tensor_of(node), tensor_of(other)
    if a is None or b is None or a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return [str(size) for size in a.shape] == [str(size) for size in b.shape]


def erase_unread(graph: Graph) -> None:
    """Take out what nobody reads any more, of operations that we replace: they write nothing."""
    functions = (F.layer_norm, F.silu, F.gelu, operator.getitem, torch.empty)
    for node in reversed(graph.nodes):
        known = name_of(node) in (RMS, ADD_RMS) or node.target in (*functions, *SHAPED)
        if known and not node.users:
            graph.erase_node(node)
