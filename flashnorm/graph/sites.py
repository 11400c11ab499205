"""Finding norms by behaviour: places where a value is divided by a statistic of itself.

Walks back from every product and quotient: `x · rsqrt(mean(x²) + ε)`, `x / sqrt(var(x) + ε)`,
`x / ‖x‖` and their spellings are one thing, a factor of degree −1 in x. No name is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from flashnorm.graph.nouns import Graph, Node, Ref
from flashnorm.graph.operations import CASTS, RESHAPES
from flashnorm.plan import Kind

# Operations through which a value stays itself: its elements keep their values and order.
SAME = CASTS | RESHAPES | {"expand", "unsqueeze", "squeeze"}
_MAX_DEPTH = 24
# Bounded functions of each element, which may stand for a norm where α·x goes in.
DYNAMIC = frozenset({"tanh", "erf", "sigmoid", "atan", "asinh", "hardtanh", "clamp"})


@dataclass(frozen=True)
class Visit:
    """One execution of a norm of `source`, the value as it is scaled.

    `output` is normalized; fused operations apply the gain as well. `standard` where the factor is
    `1 / sqrt(mean square + eps)` to the letter.
    """

    kind: Kind
    width: int
    eps: float | None
    node: Node
    source: int
    output: int
    gain: int | None = None
    bias: int | None = None
    standard: bool = True


@dataclass(frozen=True)
class Statistic:
    """`(mean(x²) + ε)^(degree / 2)` of a value x, as far as a walk back has seen it.

    `scale` is 1 for a mean and 1/width for a sum, whose ε counts that much less. Not `standard`
    where ε stands outside the root, where a number scales it, or where a variance has n − 1.
    """

    source: int
    degree: float
    width: int
    eps: float | None
    centred: bool
    scale: float = 1.0
    standard: bool = True


def find_visits(graph: Graph) -> dict[int, Visit]:
    """Every normalization in the graph, by the index of the node that produces its output."""
    found = {}
    for index, node in enumerate(graph.nodes):
        if (detect := _DETECTORS.get(node.op)) and (visit := detect(graph, node)):
            found[index] = visit
    return found


def same_as(graph: Graph, value: int) -> int:
    """The value that `value` is a cast, copy or reshape of."""
    while (node := graph.producer(value)) is not None and node.op in SAME:
        value = node.inputs[0]
    return value


def inner_nodes(graph: Graph, visit: Visit) -> set[int]:
    """The nodes between a norm's source and its output: statistics, casts and the output's own."""
    found: set[int] = set()
    waiting, source = [visit.output], same_as(graph, visit.source)
    while waiting:
        value = waiting.pop()
        index = graph.values[value].node
        if index < 0 or index in found or same_as(graph, value) == source:
            continue
        found.add(index)
        waiting += graph.nodes[index].inputs
    return found


def _product(graph: Graph, node: Node) -> Visit | None:
    operands = _two(node)
    if operands is None:
        return None
    for x, factor in (operands, operands[::-1]):
        if visit := _scaled_by_itself(graph, node, x, factor, -1.0):
            return visit
    return None


def _quotient(graph: Graph, node: Node) -> Visit | None:
    operands = _two(node)
    return _scaled_by_itself(graph, node, *operands, 1.0) if operands else None


def _scaled_by_itself(graph: Graph, node: Node, x: int, factor: int, degree: float) -> Visit | None:
    if _is_whole(graph, factor, x):
        return None
    statistic = _statistic(graph, factor, _MAX_DEPTH)
    if statistic is None or statistic.degree != degree:
        return None
    centre, source = _centre(graph, x), statistic.source
    reference = source if statistic.centred else _centre(graph, source)
    if reference is not None:
        # The same difference may be computed twice: once to be squared, once to be scaled.
        matches = centre is not None and same_as(graph, centre) == same_as(graph, reference)
    else:
        matches = same_as(graph, x) == same_as(graph, source)
    if not matches:
        return None
    kind: Kind = "rms" if centre is None else "layer"
    normalized = x if centre is None else centre
    standard = statistic.standard and statistic.scale == 1.0 and statistic.eps is not None
    return Visit(
        kind,
        statistic.width,
        statistic.eps,
        node,
        normalized,
        node.outputs[0],
        standard=standard,
    )


def _is_whole(graph: Graph, factor: int, x: int) -> bool:
    """Whether the factor has an element of its own for each of x: then it is no statistic."""
    sizes = zip(graph.values[factor].shape[::-1], graph.values[x].shape[::-1], strict=False)
    return not any(mine == 1 and whole > 1 for mine, whole in sizes) and bool(
        graph.values[factor].shape
    )


def _centre(graph: Graph, value: int) -> int | None:
    """x where `value` is `x − mean(x)`."""
    node = graph.producer(same_as(graph, value))
    if node is None or node.op != "sub" or (operands := _two(node)) is None:
        return None
    mean = graph.producer(same_as(graph, operands[1]))
    if mean is None or mean.op != "mean":
        return None
    return operands[0] if same_as(graph, mean.inputs[0]) == same_as(graph, operands[0]) else None


def _statistic(graph: Graph, value: int, depth: int) -> Statistic | None:
    node = graph.producer(value)
    if node is None or depth == 0 or not node.inputs:
        return None
    if node.op in _REDUCTIONS:
        return _REDUCTIONS[node.op](graph, node)
    if node.op in SAME:
        return _statistic(graph, node.inputs[0], depth - 1)
    step = _STEPS.get(node.op)
    return step(graph, node, depth) if step else None


def _power(exponent: float) -> Callable[[Graph, Node, int], Statistic | None]:
    def step(graph: Graph, node: Node, depth: int) -> Statistic | None:
        inner = _statistic(graph, node.inputs[0], depth - 1)
        return inner and replace(inner, degree=inner.degree * exponent)

    return step


def _pow(graph: Graph, node: Node, depth: int) -> Statistic | None:
    exponent = node.bound.get("exponent")
    if not isinstance(exponent, (int, float)):
        return None
    return _power(float(exponent))(graph, node, depth)


def _plus(graph: Graph, node: Node, depth: int) -> Statistic | None:
    """`statistic + ε`: ε is a number, or a constant whose value is not known here."""
    for side in node.inputs:
        if inner := _statistic(graph, side, depth - 1):
            others = [i for i in node.inputs if i != side]
            if any(not _is_small(graph, i) for i in others):
                return None
            eps = node.bound.get("other")
            once = inner.standard and inner.eps is None and inner.degree == 2.0
            eps = _eps(inner, eps if isinstance(eps, (int, float)) else None)
            return replace(inner, eps=eps, standard=once)
    return None


def _clamped(graph: Graph, node: Node, depth: int) -> Statistic | None:
    inner = _statistic(graph, node.inputs[0], depth - 1)
    if inner is None or any(not _is_small(graph, i) for i in node.inputs[1:]):
        return None
    low = node.bound.get("min")
    eps = _eps(inner, low if isinstance(low, (int, float)) else None)
    return replace(inner, eps=eps, standard=False)


def _eps(statistic: Statistic, number: float | None) -> float | None:
    """ε as it stands beside the mean square: outside the root it counts squared (E11 for sums)."""
    if number is None:
        return None
    return (number if statistic.degree == 2 else number**2) * statistic.scale


def _scaled(graph: Graph, node: Node, depth: int) -> Statistic | None:
    """A statistic times a number, or times a one-element value such as a width."""
    first, second = node.inputs[0], node.inputs[-1]
    if len(node.inputs) > 1 and not _is_small(graph, second):
        if not _is_small(graph, first):
            return None
        first = second
    inner = _statistic(graph, first, depth - 1)
    return inner and replace(inner, standard=False)


def _is_small(graph: Graph, value: int) -> bool:
    return prod(graph.values[value].shape) == 1


def _mean_square(graph: Graph, node: Node) -> Statistic | None:
    """mean or sum of x², x·x or |x|²."""
    square = graph.producer(same_as(graph, node.inputs[0]))
    if square is None or not square.inputs:
        return None
    source = square.inputs[0]
    is_square = (
        (square.op == "pow" and square.bound.get("exponent") == 2)
        or square.op == "square"
        or (square.op == "mul" and len(square.inputs) == 2 and square.inputs[1] == source)
    )
    if not is_square:
        return None
    width = _width(graph, node)
    return Statistic(source, 2.0, width, None, False, 1.0 if node.op == "mean" else 1.0 / width)


def _variance(graph: Graph, node: Node) -> Statistic:
    named = node.bound
    standard = named.get("correction") == 0 or named.get("unbiased") is False
    return Statistic(node.inputs[0], 2.0, _width(graph, node), None, True, standard=standard)


def _deviation(graph: Graph, node: Node) -> Statistic:
    return Statistic(node.inputs[0], 1.0, _width(graph, node), None, True, standard=False)


def _vector_norm(graph: Graph, node: Node) -> Statistic | None:
    order = node.bound.get("ord", node.bound.get("p", 2))
    if order not in (2, 2.0, None):
        return None
    width = _width(graph, node)
    return Statistic(node.inputs[0], 1.0, width, None, False, 1.0 / width)


def _width(graph: Graph, node: Node) -> int:
    before = prod(graph.values[node.inputs[0]].shape)
    return before // max(1, prod(graph.values[node.outputs[0]].shape))


def _two(node: Node) -> tuple[int, int] | None:
    sides = node.args[:2]
    if len(sides) == 2 and all(isinstance(side, Ref) for side in sides):
        return sides[0].value, sides[1].value
    return None


def _fused_layer(graph: Graph, node: Node) -> Visit:
    return _fused("layer", graph, node)


def _fused_rms(graph: Graph, node: Node) -> Visit:
    return _fused("rms", graph, node)


def _fused(kind: Kind, graph: Graph, node: Node) -> Visit:
    named = node.bound
    width = prod(named["normalized_shape"])
    return Visit(
        kind,
        width,
        named["eps"],
        node,
        named["input"].value,
        node.outputs[0],
        _ref(named.get("weight")),
        _ref(named.get("bias")),
    )


def _ref(item: Any) -> int | None:
    return item.value if isinstance(item, Ref) else None


def _dyt(graph: Graph, node: Node) -> Visit | None:
    """`f(α·x)`, or `f(α·x + b)`, element by element, with one-element parameters α and b."""
    inner = graph.producer(same_as(graph, node.inputs[0]))
    if inner is not None and inner.op == "add" and (sides := _two(inner)) is not None:
        rest = [side for side in sides if not _is_scalar(graph, side)]
        inner = graph.producer(same_as(graph, rest[0])) if len(rest) == 1 else None
    if inner is None or inner.op != "mul" or (sides := _two(inner)) is None:
        return None
    for x, alpha in (sides, sides[::-1]):
        shape = graph.values[x].shape
        if _is_scalar(graph, alpha) and shape:
            return Visit("dyt", shape[-1], None, node, x, node.outputs[0])
    return None


def _is_scalar(graph: Graph, value: int) -> bool:
    """Whether this is a parameter of one element."""
    return _is_small(graph, value) and graph.values[same_as(graph, value)].origin == "parameter"


_STEPS: dict[str, Callable[[Graph, Node, int], Statistic | None]] = {
    "rsqrt": _power(-0.5),
    "sqrt": _power(0.5),
    "reciprocal": _power(-1.0),
    "pow": _pow,
    "add": _plus,
    "clamp_min": _clamped,
    "clamp": _clamped,
    "maximum": _clamped,
    "mul": _scaled,
    "div": _scaled,
}
_REDUCTIONS: dict[str, Callable[[Graph, Node], Statistic | None]] = {
    "mean": _mean_square,
    "sum": _mean_square,
    "var": _variance,
    "std": _deviation,
    "linalg_vector_norm": _vector_norm,
    "norm": _vector_norm,
}
_DETECTORS: dict[str, Callable[[Graph, Node], Visit | None]] = {
    "mul": _product,
    "div": _quotient,
    "native_layer_norm": _fused_layer,
    "_fused_rms_norm": _fused_rms,
    "rms_norm": _fused_rms,
    **dict.fromkeys(DYNAMIC, _dyt),
}
