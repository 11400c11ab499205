"""One rule per kind of operation: what happens to the gain indices of what it reads.

A rule returns one gain index (or None) per output, and raises Blocked, with a reason in plain
words, where `f(v ⊙ g)` is not `f(v) ⊙ g'` for a g' that only moves elements of g around.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashnorm.graph.contractions import CONTRACTIONS, contract
from flashnorm.graph.failures import Blocked, UnknownSpelling
from flashnorm.graph.flow import Flow
from flashnorm.graph.gain_index import FREE, NONE, Conflict, filled, taken, unify, varies, without
from flashnorm.graph.ir import Node, Ref, substitute
from flashnorm.graph.operations import CASTS, MOVES, RESHAPES
from flashnorm.graph.params import picked_axis
from flashnorm.graph.record import ALIAS_WRITE, Geometry

Indices = list[Tensor | None]
Rule = Callable[[Flow, Node], Indices]


def _keep(flow: Flow, node: Node) -> Indices:
    """Casts and copies."""
    return [flow.indices[node.inputs[0]]]


def _move(flow: Flow, node: Node) -> Indices:
    """Views, slices, permutations and concatenations: run them on the gain indices."""
    args = substitute(node.args, flow.index_of)
    out = node.func(*args, **node.kwargs)
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _reshape(flow: Flow, node: Node) -> Indices:
    return [flow.indices[node.inputs[0]].reshape(flow.graph.values[node.outputs[0]].shape)]


def _pad(flow: Flow, node: Node) -> Indices:
    if node.bound.get("value", 0) != 0:
        raise Blocked(f"it is padded with numbers other than zero ({node.where})")
    return [torch.constant_pad_nd(flow.indices[node.inputs[0]], node.args[1], FREE)]


def _pick(flow: Flow, node: Node) -> Indices:
    """Rows picked by an index: tokens sent to experts, the last positions before a head."""
    picked = picked_axis(flow.graph, node)
    gain_index = flow.indices.get(node.args[0].value)
    if picked is None or gain_index is None or not gain_index.ndim:
        raise UnknownSpelling(f"it is picked from in a way that cannot be followed ({node.where})")
    try:
        return [taken(gain_index, *picked)]
    except Conflict:
        raise Blocked(f"its features are picked by an index ({node.where})") from None


def _gather(flow: Flow, node: Node) -> Indices:
    gain_index = flow.indices.get(node.inputs[0])
    dim = node.args[1]
    if gain_index is None or not gain_index.ndim or varies(gain_index, dim):
        raise Blocked(f"its features are picked by an index ({node.where})")
    shape = flow.graph.values[node.outputs[0]].shape
    for axis, size in enumerate(shape):
        gain_index = gain_index.narrow(axis, 0, 1 if axis == dim % len(shape) else size)
    return [gain_index.expand(shape)]


def _multiply(flow: Flow, node: Node) -> Indices:
    indexed = [v for v in node.inputs if v in flow.indices]
    if len(indexed) > 1:
        raise Blocked(f"it is multiplied by a function of itself or another norm ({node.where})")
    return [flow.indices[indexed[0]].expand(flow.graph.values[node.outputs[0]].shape)]


def _divide(flow: Flow, node: Node) -> Indices:
    if node.inputs[-1] in flow.indices and len(node.inputs) > 1:
        raise Blocked(f"it is divided by ({node.where})")
    if node.bound.get("rounding_mode"):
        raise Blocked(f"it is rounded ({node.where})")
    return _multiply(flow, node)


def _add(flow: Flow, node: Node) -> Indices:
    """Sums of equally indexed values, and of zeros."""
    if len(node.inputs) < 2:
        raise Blocked(f"a number is added to its output ({node.where})")
    first, second = node.inputs[:2]
    for value, other in ((first, second), (second, first)):
        if value in flow.indices and other not in flow.indices and flow.parameters_in(other):
            return _norm_bias(flow, node, value, other)
    return [_unified(flow, node, first, second)]


def _norm_bias(flow: Flow, node: Node, value: int, bias: int) -> Indices:
    """A norm's bias: it moves with the gain (E2, E13)."""
    subtracted = node.op == "sub" and node.inputs[1] == bias
    if node.bound.get("alpha", 1) != 1 or subtracted:
        raise Blocked(f"a bias is subtracted from it, or added in part ({node.where})")
    gain_index = flow.indices[value].expand(flow.graph.values[node.outputs[0]].shape)
    flow.add_norm_bias(gain_index, bias, node, again=value in flow.biased)
    return [gain_index]


def _unified(flow: Flow, node: Node, first: int, second: int) -> Tensor:
    try:
        gain_index = unify(flow.index_of(first), flow.index_of(second))
    except Conflict:
        raise Blocked(_sum_reason(flow, node, first, second)) from None
    return gain_index.expand(flow.graph.values[node.outputs[0]].shape)


def _sum_reason(flow: Flow, node: Node, first: int, second: int) -> str:
    other = next((v for v in (first, second) if v not in flow.indices), None)
    if other is None:
        return f"it is added to a value that carries other gains ({node.where})"
    return f"its output is also added to another value, such as the residual ({node.where})"


def _lerp(flow: Flow, node: Node) -> Indices:
    """Token shifts: a weighted sum of two equally indexed values."""
    if any(value in flow.indices for value in node.inputs[2:]):
        raise Blocked(f"it decides how other values are mixed ({node.where})")
    return [_unified(flow, node, node.inputs[0], node.inputs[1])]


def _where(flow: Flow, node: Node) -> Indices:
    named = node.bound
    if named["condition"].value in flow.indices:
        raise Blocked(f"it decides a condition ({node.where})")
    sides = [_side(flow, node, named["self"]), _side(flow, node, named["other"])]
    return [_unify_indices(flow, node, *sides)]


def _side(flow: Flow, node: Node, item: Any) -> Tensor:
    if isinstance(item, Ref):
        return flow.index_of(item.value)
    return filled((), FREE if item == 0 else NONE)


def _unify_indices(flow: Flow, node: Node, first: Tensor, second: Tensor) -> Tensor:
    try:
        return unify(first, second).expand(flow.graph.values[node.outputs[0]].shape)
    except Conflict:
        raise Blocked(f"it is mixed with values that carry other gains ({node.where})") from None


def _masked_fill(flow: Flow, node: Node) -> Indices:
    gain_index = flow.indices.get(node.args[0].value)
    if gain_index is None or _side(flow, node, node.args[2]).max() != FREE:
        raise Blocked(f"it is overwritten with other numbers ({node.where})")
    return [gain_index.expand(flow.graph.values[node.outputs[0]].shape)]


def _sum(flow: Flow, node: Node) -> Indices:
    """Sums and means over axes along which the gain is the same."""
    gain_index = flow.indices[node.inputs[0]]
    dims = node.bound.get("dim")
    dims = list(range(gain_index.ndim)) if dims in (None, []) else dims
    dims = [dims] if isinstance(dims, int) else list(dims)
    try:
        rest = without(gain_index, dims)
    except Conflict:
        raise Blocked(f"its features are summed ({node.where})") from None
    return [rest.reshape(flow.graph.values[node.outputs[0]].shape)]


def _cumulate(flow: Flow, node: Node) -> Indices:
    gain_index = flow.indices[node.inputs[0]]
    if varies(gain_index, node.args[1]):
        raise Blocked(f"its features are summed ({node.where})")
    return [gain_index]


def _add_rows(flow: Flow, node: Node) -> Indices:
    """`index_add` and its kin: rows of one value added to or written over rows of another."""
    named = node.bound
    source = named.get("source", named.get("src"))
    return _into_rows(flow, node, named["self"], source, [named["dim"]])


def _put_rows(flow: Flow, node: Node) -> Indices:
    named = node.bound
    axes: list[int] = []
    position = 0
    for index in named["indices"]:
        taken_axes = _axes_of_index(flow, index)
        axes += range(position, position + taken_axes) if isinstance(index, Ref) else []
        position += taken_axes
    return _into_rows(flow, node, named["self"], named["values"], axes)


def _axes_of_index(flow: Flow, index: Any) -> int:
    """A mask takes as many axes as it has, anything else one."""
    if not isinstance(index, Ref):
        return 1
    value = flow.graph.values[index.value]
    return len(value.shape) if value.dtype in (torch.bool, torch.uint8) else 1


def _into_rows(flow: Flow, node: Node, target: Any, source: Any, axes: list[int]) -> Indices:
    shape = flow.graph.values[node.outputs[0]].shape
    if not shape or not axes:
        raise UnknownSpelling(f"it is written by an index without an axis ({node.where})")
    rows = _side(flow, node, source)
    axes = [axis % len(shape) for axis in axes]
    try:
        if rows.ndim:
            lead = [a for a in range(rows.ndim - len(shape) + max(axes) + 1) if a < rows.ndim]
            rows = without(rows, lead)
    except Conflict:
        raise Blocked(f"its features are written by an index ({node.where})") from None
    return [_unify_indices(flow, node, flow.index_of(target.value), rows.expand(shape))]


def _copy(flow: Flow, node: Node) -> Indices:
    """A value written over another one: its gain indices replace those that were there."""
    return [flow.index_of(node.args[1].value).expand(flow.graph.values[node.outputs[0]].shape)]


def _write_alias(flow: Flow, node: Node) -> Indices:
    """A part of the memory that a value shares was written: its gain indices change where it
    was."""
    whole, part = node.args[0].value, node.args[1].value
    outer, inner = node.args[2], node.args[3]
    if not isinstance(inner, Geometry) or _overlaps_itself(outer) or _overlaps_itself(inner):
        raise Blocked(f"it is written into shared memory ({node.where})")
    memory = torch.full((max(_end(outer), _end(inner)),), NONE)
    mine = memory.as_strided(outer.size, outer.stride, outer.offset)
    mine.copy_(flow.index_of(whole))
    memory.as_strided(inner.size, inner.stride, inner.offset).copy_(flow.index_of(part))
    return [mine.clone()]


def _overlaps_itself(geometry: Geometry) -> bool:
    """Whether two of its elements may lie in the same place."""
    covered = 0
    sizes = zip(geometry.stride, geometry.size, strict=True)
    for stride, size in sorted(pair for pair in sizes if pair[1] > 1):
        if stride <= covered:
            return True
        covered += (size - 1) * stride
    return False


def _end(geometry: Geometry) -> int:
    """One past the last element in memory."""
    steps = zip(geometry.size, geometry.stride, strict=True)
    return geometry.offset + sum((n - 1) * s for n, s in steps) + 1


def _scatter_slice(flow: Flow, node: Node) -> Indices:
    args = substitute(node.args, lambda v: flow.index_of(v).contiguous())
    return [node.func(*args, **node.kwargs)]


def _none(flow: Flow, node: Node) -> Indices:
    """The shape or the type is read, not the numbers."""
    return [None] * len(node.outputs)


RULES: dict[str, Rule] = {
    **dict.fromkeys(CASTS, _keep),
    **dict.fromkeys(MOVES | {"cat", "stack", "roll", "unfold", "diagonal"}, _move),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(CONTRACTIONS, contract),
    **dict.fromkeys(("add", "sub"), _add),
    **dict.fromkeys(("sum", "mean"), _sum),
    **dict.fromkeys(("index_add", "index_copy", "scatter_add", "scatter"), _add_rows),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scatter_slice),
    **dict.fromkeys(
        (
            "zeros_like",
            "ones_like",
            "empty_like",
            "full_like",
            "rand_like",
            "new_zeros",
            "new_ones",
            "new_empty",
            "new_full",
        ),
        _none,
    ),
    "constant_pad_nd": _pad,
    "index": _pick,
    "index_select": _pick,
    "gather": _gather,
    "mul": _multiply,
    "neg": _multiply,
    "div": _divide,
    "lerp": _lerp,
    "where": _where,
    "masked_fill": _masked_fill,
    "cumsum": _cumulate,
    "index_put": _put_rows,
    "copy": _copy,
    ALIAS_WRITE: _write_alias,
}
