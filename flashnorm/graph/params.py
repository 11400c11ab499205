"""Views of parameters: which parameter a value shows, and which of its rows and columns.

For every axis of the parameter a coordinate tensor, shaped like the view, tells which position of
that axis each element comes from. Coordinates have stride 0 wherever they do not vary, so a view of
a matrix of any size costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashnorm.graph.gain_index import Conflict, taken, varies
from flashnorm.graph.ir import Graph, Node, Ref
from flashnorm.graph.operations import CASTS, MOVES, RESHAPES

# The view holds the parameter's own elements, or these times one constant, or any function of
# each element by itself.
SAME, SCALED, POINTWISE = range(3)

_POINTWISE = frozenset({"add", "sub", "rsub", "mul", "div", "neg", "exp", "abs", "softplus"})
# Above this many elements a coordinate is given up rather than written out.
_LARGEST_COPY = 1 << 24


@dataclass(frozen=True)
class ParamView:
    """A value made of one parameter: its name, and per axis of it a coordinate (None: unknown).

    `picked` are the axes of the parameter along which a value chose the positions.
    """

    name: str
    sizes: tuple[int, ...]
    coordinates: tuple[Tensor | None, ...]
    relation: int = SAME
    picked: frozenset[int] = frozenset()

    @staticmethod
    def of(name: str, shape: Sequence[int]) -> ParamView:
        coordinates = []
        for axis, size in enumerate(shape):
            lead = [1] * len(shape)
            lead[axis] = size
            coordinates.append(torch.arange(size).view(lead).expand(tuple(shape)))
        return ParamView(name, tuple(shape), tuple(coordinates))

    @property
    def numel(self) -> int:
        return int(torch.Size(self.sizes).numel())

    def elements(self) -> Tensor | None:
        """The flat position in the parameter of every element of the view."""
        stride = 1
        flat = torch.zeros((), dtype=torch.long)
        for size, coordinate in zip(reversed(self.sizes), reversed(self.coordinates), strict=True):
            if coordinate is None:
                return None
            flat = flat + coordinate * stride
            stride *= size
        return flat


def derive(graph: Graph, node: Node, views: dict[int, ParamView]) -> list[ParamView] | None:
    """The views that `node` makes of a view, one per output; None if it makes something else."""
    inputs = [i for i in node.inputs if i in views]
    if len(set(inputs)) != 1 or node.args == () or not isinstance(node.args[0], Ref):
        return None
    view = views[inputs[0]]
    if node.op in CASTS:
        return [view]
    if node.op in MOVES | RESHAPES and node.args[0].value == inputs[0]:
        return _moved(node, view)
    if node.op in ("index", "index_select") and node.args[0].value == inputs[0]:
        return _picked(graph, node, view)
    if node.op in _POINTWISE:
        return _pointwise(graph, node, view)
    return None


def _moved(node: Node, view: ParamView) -> list[ParamView] | None:
    moved = [_run_view(node, c) for c in view.coordinates]
    count = len(node.outputs)
    parts = [[None] * count if m is None else m for m in moved]
    return [replace(view, coordinates=tuple(p[i] for p in parts)) for i in range(count)]


def _run_view(node: Node, coordinate: Tensor | None) -> list[Tensor] | None:
    if coordinate is None:
        return None
    try:
        out = run_on(node, coordinate)
    except RuntimeError:
        # The axes cannot be merged without a copy; small ones are copied.
        if node.op not in RESHAPES or coordinate.numel() > _LARGEST_COPY:
            return None
        out = coordinate.reshape(node.args[1])
    return list(out) if isinstance(out, (tuple, list)) else [out]


def run_on(node: Node, tensor: Tensor) -> Any:
    """The node's own operation on another tensor in the place of its first argument."""
    return node.func(tensor, *node.args[1:], **node.kwargs)


def _picked(graph: Graph, node: Node, view: ParamView) -> list[ParamView] | None:
    """Rows picked by an index that is not known: experts chosen by a router."""
    if (picked := picked_axis(graph, node)) is None:
        return None
    axis, shape = picked
    chosen = {n for n, c in enumerate(view.coordinates) if c is not None and varies(c, axis)}
    coordinates = tuple(_pick(c, axis, shape) for c in view.coordinates)
    return [replace(view, coordinates=coordinates, picked=view.picked | chosen)]


def _pick(coordinate: Tensor | None, axis: int, shape: Sequence[int]) -> Tensor | None:
    if coordinate is None:
        return None
    try:
        return taken(coordinate, axis, shape)
    except Conflict:
        # The picked axis itself: any of its positions, one at a time.
        return taken(coordinate.narrow(axis, 0, 1).expand(coordinate.shape), axis, shape)


def picked_axis(graph: Graph, node: Node) -> tuple[int, tuple[int, ...]] | None:
    """The axis that `index` or `index_select` picks from, and the shape of the index."""
    if node.op == "index_select":
        dim, index = node.args[1], node.args[2]
        return dim, graph.values[index.value].shape
    used = [(axis, i) for axis, i in enumerate(node.args[1]) if isinstance(i, Ref)]
    if len(used) != 1:
        return None
    axis, index = used[0]
    chosen = graph.values[index.value]
    if chosen.dtype not in (torch.bool, torch.uint8):
        return axis, chosen.shape
    if len(chosen.shape) != 1:
        return None
    return axis, graph.values[node.outputs[0]].shape[axis : axis + 1]


def _pointwise(graph: Graph, node: Node, view: ParamView) -> list[ParamView] | None:
    """A function of each element by itself: `1 + w`, `w · c`. Other operands must be numbers."""
    same_shape = graph.values[node.inputs[0]].shape == graph.values[node.outputs[0]].shape
    if len(node.inputs) != 1 or not same_shape:
        return None
    scaled = node.op in ("mul", "div", "neg") and not node.bound.get("rounding_mode")
    linear = scaled and view.relation != POINTWISE
    relation = max(view.relation, SCALED) if linear else POINTWISE
    return [replace(view, relation=relation)]
