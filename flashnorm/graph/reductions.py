"""Sums, means, largest elements and lengths: how a statistic of a value begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from flashnorm.graph.factors import Factors, Powers, opened, root, times
from flashnorm.graph.ir import Graph, Node, Ref

Form = Literal["square", "mean", "variance", "other"]


@dataclass(frozen=True)
class Statistic:
    """`(inner · form(x) + ε)^power` of a value x, as far as it is known.

    `source` are the factors of x, `value` is x as it was read, `axes` (from the end) are those it
    is taken over. `plain` where it is that to the letter: not where ε stands outside of a root or
    is a bound, or where a number is unknown.
    """

    source: Powers
    value: int
    form: Form
    degree: float
    axes: frozenset[int]
    width: int
    power: float = 1.0
    inner: float = 1.0
    eps: float | None = None
    plain: bool = True

    @property
    def epsilon(self) -> float | None:
        """ε as it stands beside the mean square (E11 for sums)."""
        return self.eps and self.eps / self.inner if self.form == "square" else self.eps

    @property
    def is_mean(self) -> bool:
        exact = self.power == 1.0 and self.eps is None and self.plain
        return self.form == "mean" and exact and abs(abs(self.inner) - 1.0) < 1e-12


@dataclass(frozen=True)
class Reduced:
    """x^k, or |x|^k where not `signed`, about to be put together over some axes."""

    source: Powers
    value: int
    k: int
    signed: bool
    width: int
    axes: frozenset[int]

    def made(self, form: Form, degree: float, **facts: Any) -> Statistic:
        return Statistic(self.source, self.value, form, degree, self.axes, self.width, **facts)


def _reduced(factors: Factors, value: int, width: int, axes: frozenset[int]) -> Reduced | None:
    """What is summed, as a power of something."""
    powers = factors.factors(value)
    whole = opened(powers, factors.magnitudes)
    if whole is None or (base := root(whole)) is None:
        return None
    source, k = base
    read = value
    while factors.factors(read) != source:
        made = factors.graph.producer(read)
        if made is None or not made.inputs:
            return None
        read = made.inputs[0]
    return Reduced(source, read, k, powers == whole, width, axes)


def raised_to(statistic: Statistic, power: float) -> Statistic:
    return replace(statistic, power=statistic.power * power, degree=statistic.degree * power)


def scaled(statistic: Statistic, number: float | None, sign: float = 1.0) -> Statistic:
    if number is None or number == 0 or statistic.eps is not None or statistic.power != 1.0:
        return replace(statistic, plain=False)
    return replace(statistic, inner=statistic.inner * number**sign)


def with_eps(statistic: Statistic, number: float | None) -> Statistic:
    """ε within the root; outside of it, it counts squared."""
    once = statistic.plain and statistic.eps is None and statistic.degree == 2.0
    if number is not None and statistic.degree == 1.0:
        number = number**2
    return replace(statistic, eps=number, plain=once and number is not None)


def difference(first: Statistic, second: Statistic, sign: float) -> Statistic | None:
    """mean(x²) − mean(x)² is the variance; other sums of one degree are only that."""
    if first.source != second.source or first.degree != second.degree:
        return None
    is_variance = (
        sign < 0
        and (first.form, second.form) == ("square", "mean")
        and (first.power, second.power) == (1.0, 2.0)
        and first.axes == second.axes
        and first.eps is None
        and second.eps is None
        and abs(first.inner - 1.0) < 1e-12
    )
    if is_variance:
        return replace(first, form="variance")
    return replace(first, form="other", power=1.0, inner=1.0, eps=None, plain=False)


def _axes(graph: Graph, node: Node) -> frozenset[int]:
    """The axes of a reduction, from the end."""
    ndim = len(graph.values[node.inputs[0]].shape)
    dims = node.bound.get("dim")
    dims = range(ndim) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    return frozenset(d % ndim - ndim for d in dims)


def _read(factors: Factors, node: Node) -> Reduced | None:
    axes, shape = _axes(factors.graph, node), factors.graph.values[node.inputs[0]].shape
    return _reduced(factors, node.inputs[0], prod(shape[axis] for axis in axes), axes)


def _mean(factors: Factors, node: Node) -> list[Statistic | None]:
    read = _read(factors, node)
    if read is None:
        return []
    inner = 1.0 if node.op == "mean" else float(read.width)
    form: Form = "other"
    if read.k == 2:
        form = "square"
    elif read.k == 1 and read.signed:
        form = "mean"
    return [read.made(form, float(read.k), inner=inner)]


def _largest(factors: Factors, node: Node) -> list[Statistic | None]:
    read = _read(factors, node)
    return [read.made("other", float(read.k))] if read else []


def _variance(power: float) -> Callable[[Factors, Node], list[Statistic | None]]:
    def reduction(factors: Factors, node: Node) -> list[Statistic | None]:
        read = _read(factors, node)
        if read is None or read.k != 1 or not read.signed:
            return []
        named = node.bound
        plain = named.get("correction") == 0 or named.get("unbiased") is False
        mean = read.made("mean", 1.0)
        spread = read.made("variance", 2.0 * power, power=power, plain=plain)
        return [spread, mean]

    return reduction


def _norm(factors: Factors, node: Node) -> list[Statistic | None]:
    read, named = _read(factors, node), node.bound
    order = named.get("ord", named.get("p", 2))
    if read is None or not isinstance(order, (int, float, type(None))) or order == 0:
        return []
    if order in (None, 2) and read.k == 1:
        return [read.made("square", 1.0, power=0.5, inner=float(read.width))]
    return [read.made("other", float(read.k))]


def _dot(factors: Factors, node: Node) -> list[Statistic | None]:
    """x · x, row by row, as a product of matrices or of vectors."""
    if node.op == "einsum":
        sides = [item.value for item in node.args[1]]
        inputs, _, output = node.args[0].replace(" ", "").partition("->")
        parts = inputs.split(",")
        if len(set(parts)) != 1 or parts[0][:-1] != output:
            return []
    else:
        sides = [item.value for item in node.args[:2] if isinstance(item, Ref)]
    if len(sides) != 2:
        return []
    first, second = (factors.factors(side) for side in sides)
    width = factors.graph.values[sides[0]].shape[-1:]
    whole = factors.size(node.outputs[0]) * prod(width) == factors.size(sides[0])
    product = times(first, second)
    if first != second or product is None or not whole:
        return []
    read = _reduced(factors, sides[0], prod(width), frozenset({-1}))
    if read is None or read.k != 1:
        return []
    return [read.made("square", 2.0, inner=float(read.width))]


REDUCTIONS: dict[str, Callable[[Factors, Node], list[Statistic | None]]] = {
    **dict.fromkeys(("mean", "sum"), _mean),
    **dict.fromkeys(("amax", "amin", "max", "min", "median"), _largest),
    **dict.fromkeys(("var", "var_mean"), _variance(1.0)),
    **dict.fromkeys(("std", "std_mean"), _variance(0.5)),
    **dict.fromkeys(("linalg_vector_norm", "norm", "linalg_norm"), _norm),
    **dict.fromkeys(
        ("bmm", "mm", "mv", "dot", "vdot", "matmul", "einsum", "linalg_vecdot", "inner"), _dot
    ),
}
