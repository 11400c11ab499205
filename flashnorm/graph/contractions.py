"""Contractions: a gain along the summed axis goes into the parameter on the other side (E1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashnorm.graph.failures import Blocked
from flashnorm.graph.flow import Flow, Use
from flashnorm.graph.gain_index import Conflict, along, varies, without
from flashnorm.graph.ir import Node, Ref
from flashnorm.graph.params import POINTWISE, ParamView


@dataclass(frozen=True)
class Side:
    """One operand: its value, the axis that is summed, and where its other axes go in the output.

    `free` is the output axis, from the end, of the axis that only this side has; None if that is
    not simply one axis.
    """

    value: int
    axis: int
    free: int | None


Operands = tuple[Side, Side, int | None]


def _product(first: str, second: str, added: str | None = None) -> Callable[[Node], Operands]:
    """Matrix products [.., m, k] × [.., k, n]."""

    def operands(node: Node) -> Operands:
        named = node.bound
        extra = named[added].value if added else None
        return Side(named[first].value, -1, -2), Side(named[second].value, -2, -1), extra

    return operands


def _matrix_vector(node: Node) -> Operands:
    named = node.bound
    return Side(named["self"].value, -1, -1), Side(named["vec"].value, -1, None), None


def _linear(node: Node) -> Operands:
    named = node.bound
    bias = named["bias"].value if isinstance(named["bias"], Ref) else None
    return Side(named["input"].value, -1, None), Side(named["weight"].value, -1, None), bias


def _convolution(node: Node) -> Operands:
    named = node.bound
    if named["groups"] != 1:
        raise Blocked(f"its output is read by a grouped convolution ({node.where})")
    bias = named["bias"].value if isinstance(named["bias"], Ref) else None
    axis = 0 if named["transposed"] else 1
    return Side(named["input"].value, 1, None), Side(named["weight"].value, axis, None), bias


CONTRACTIONS: dict[str, Callable[[Node], Operands]] = {
    "mm": _product("self", "mat2"),
    "bmm": _product("self", "mat2"),
    "addmm": _product("mat1", "mat2", "self"),
    "baddbmm": _product("batch1", "batch2", "self"),
    "addbmm": _product("batch1", "batch2", "self"),
    "_grouped_mm": _product("self", "mat2"),
    "mv": _matrix_vector,
    "linear": _linear,
    "convolution": _convolution,
}


def contract(flow: Flow, node: Node) -> list[Tensor | None]:
    """The rule of every contraction: absorb along the summed axis, carry along the others."""
    first, second, added = CONTRACTIONS[node.op](node)
    if added is not None and added in flow.indices:
        raise Blocked(f"its output is added to another value ({node.where})")
    carried: list[Tensor] = []
    for side, other in ((first, second), (second, first)):
        gain_index = flow.indices.get(side.value)
        if gain_index is None:
            continue
        if varies(gain_index, side.axis):
            if other.value in flow.indices:
                raise Blocked(f"it is multiplied by another norm's output ({node.where})")
            _absorbed(flow, node, side, other)
        else:
            carried.append(carry(flow, node, side, gain_index))
    if len(carried) == 2 or (carried and added is not None):
        raise Blocked(f"its output is added to another value ({node.where})")
    return [*carried, None][:1]


def carry(flow: Flow, node: Node, side: Side, gain_index: Tensor) -> Tensor:
    """A gain index along an axis that is not summed stays on it: values in an attention's sum."""
    shape = flow.graph.values[node.outputs[0]].shape
    if side.free is None or len(shape) != gain_index.ndim:
        raise Blocked(f"its output is read by {node.where} along an axis that is not summed")
    rest = without(gain_index, [side.axis])
    return rest.unsqueeze(-1 if side.free == -2 else -2).expand(shape)


def _absorbed(flow: Flow, node: Node, side: Side, other: Side) -> tuple[str, Use]:
    """The use of the parameter on the other side; Blocked where there is none that can absorb."""
    view = flow.views.get(other.value)
    if view is None or view.relation == POINTWISE:
        raise Blocked(f"its output is multiplied with {_what(flow, other.value)} ({node.where})")
    try:
        indices = along(flow.indices[side.value], side.axis)
        axis, positions = column(view, other.axis)
    except Conflict:
        raise Blocked(
            f"the columns of {view.name} do not each meet one gain element ({node.where})"
        ) from None
    return view.name, Use(node, axis=axis, positions=positions, indices=indices)


def _what(flow: Flow, value: int) -> str:
    names = flow.parameters_in(value)
    if names is None:
        return "another activation"
    return f"a function of {', '.join(sorted(names)[:3])}" if names else "a constant"


def column(view: ParamView, axis: int) -> tuple[int, Tensor]:
    """The parameter's axis that runs along `axis` of the view, and its positions there.

    Raises Conflict where that is not just one, or where the view has no such axis.
    """
    found = []
    for number, coordinate in enumerate(view.coordinates):
        if coordinate is None or not -coordinate.ndim <= axis < coordinate.ndim:
            raise Conflict
        if varies(coordinate, axis):
            found.append((number, along(coordinate, axis)))
    if len(found) != 1:
        raise Conflict
    return found[0]


def record_uses(flow: Flow, node: Node) -> None:
    """Note what a contraction does with the parameters it reads."""
    try:
        first, second, added = CONTRACTIONS[node.op](node)
    except Blocked:
        first = second = None  # type: ignore[assignment]
        added = None
    sides = {side.value: other for side, other in ((first, second), (second, first)) if side}
    for value in node.inputs:
        view = flow.views.get(value)
        if view is None:
            continue
        other = sides.get(value)
        if other is None or not _is_nothing(flow, other.value):
            flow.uses[view.name].append(_use(flow, node, value, other, added))


def _is_nothing(flow: Flow, value: int) -> bool:
    """Zeros, and the rows of an expert that got no token: the product is the same for any gain."""
    return value in flow.zeros or 0 in flow.graph.values[value].shape


def _use(flow: Flow, node: Node, value: int, other: Side | None, added: int | None) -> Use:
    """How `node` uses the parameter shown by `value`, contracted with `other`."""
    if other is None or value == added:
        return Use(node, other=True)
    gain_index = flow.indices.get(other.value)
    if gain_index is None or not varies(gain_index, other.axis):
        return Use(node)
    mine = Side(value, _axis_of(node, value), None)
    try:
        use = _absorbed(flow, node, other, mine)[1]
    except Blocked:
        return Use(node)
    return replace(use, slot=_slot(flow, node, mine, added)) if other.value in flow.sums else use


def _slot(flow: Flow, node: Node, weight: Side, added: int | None) -> str:
    """The bias that can take `W β` (E2): added to the product, row by row of the same matrix."""
    matrix, bias = flow.views[weight.value], flow.views.get(added) if added is not None else None
    if bias is None or node.op not in ("linear", "addmm") or max(matrix.relation, bias.relation):
        return ""
    if node.bound.get("alpha", 1) != 1 or node.bound.get("beta", 1) != 1:
        return ""
    if len(matrix.sizes) != 2 or len(bias.sizes) != 1 or bias.coordinates[0] is None:
        return ""
    try:
        _, rows = column(matrix, -2 if weight.axis == -1 else -1)
    except Conflict:
        return ""
    return bias.name if torch.equal(rows, bias.coordinates[0].flatten()) else ""


def _axis_of(node: Node, value: int) -> int:
    first, second, _ = CONTRACTIONS[node.op](node)
    return next(side.axis for side in (first, second) if side.value == value)
