"""Statistics of a value: what is the same for all elements of a row, and scales as the value does.

A statistic is homogeneous: that of t·x is t^degree times that of x. Means, sums, norms, variances
and largest elements are; so are their powers, products, and sums of equal degree. A small number
added to one, or held below it, is its ε.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from flashnorm.graph.factors import Factors, Powers, opened, operation, raised
from flashnorm.graph.ir import Graph, Node, Ref
from flashnorm.graph.reductions import (
    REDUCTIONS,
    Form,
    Statistic,
    difference,
    raised_to,
    scaled,
    with_eps,
)


@dataclass(frozen=True)
class Center:
    """`x − mean(x)`: the factors of x, x itself, and the axes of the mean."""

    powers: Powers
    value: int
    axes: frozenset[int]


@dataclass
class Statistics:
    """All statistics, and all differences from a mean, by the value that is one."""

    factors: Factors
    known: dict[int, Statistic] = field(default_factory=dict)
    centers: dict[int, Center] = field(default_factory=dict)
    logarithms: dict[int, Statistic] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.factors.graph

    def of(self, value: int) -> Statistic | None:
        return self.known.get(self.factors.same_of(value))

    def read(self, node: Node) -> None:
        """Enter what the next operation makes, where it is a statistic or a product."""
        op = operation(node)
        if not node.inputs or self.factors.roots_of(node.outputs[0]) is not None:
            return
        if op in REDUCTIONS and not self.factors.recognize(node):
            for out, made in zip(node.outputs, REDUCTIONS[op](self.factors, node), strict=False):
                if made is not None and made.width > 1:
                    self.known[out] = made
        elif op in _POWERS or op == "pow":
            power = _POWERS.get(op, node.bound.get("exponent"))
            if isinstance(power, (int, float)) and not self.factors.recognize(node):
                self._raise(node, float(power))
        elif op in ("add", "sub") and not self.factors.recognize(node):
            self._add(node, -1.0 if op == "sub" else 1.0)
        elif op in ("mul", "div", "neg"):
            self._multiply(node, op)
        elif op in ("clamp", "clamp_min", "maximum", "fmax", "where", "relu"):
            self._bound(node, op)
        elif op in ("log", "exp"):
            self._logarithm(node, op)

    def numbers(self, node: Node, learned: bool = False) -> tuple[list[int], list[float | None]]:
        """What of the first two arguments are values, and what are numbers (None: unknown).

        With `learned` a parameter of one element is a number as well.
        """
        values: list[int] = []
        numbers: list[float | None] = []
        for item in node.args[:2]:
            if isinstance(item, Ref) and not self.factors.is_number(item.value, learned):
                values.append(item.value)
            else:
                known = isinstance(item, (int, float))
                numbers.append(float(item) if known else None)
        return values, numbers

    def _raise(self, node: Node, power: float) -> None:
        out, read = node.outputs[0], node.inputs[0]
        self.factors.powers[out] = raised(self.factors.factors(read), power)
        if (statistic := self.of(read)) is not None:
            self.known[out] = raised_to(statistic, power)

    def _multiply(self, node: Node, op: str) -> None:
        """Products of statistics by numbers and by each other; other products are for `sites`."""
        values, numbers = self.numbers(node)
        statistics = [self.of(value) for value in values]
        sign = -1.0 if op == "div" else 1.0
        if node.bound.get("rounding_mode") or not statistics:
            return
        first = statistics[0]
        if len(values) == 1:
            if self.factors.recognize(node):
                return
            self._scale(node, values[0], -1.0 if op == "neg" else numbers[0], sign)
        elif first is not None and statistics[-1] is not None:
            self._combine(node, first, raised_to(statistics[-1], sign))

    def _scale(self, node: Node, value: int, number: float | None, sign: float) -> None:
        """A value times a number has the factors of the value."""
        upside_down = sign < 0 and not _is_first(node, value)
        out, factors = node.outputs[0], self.factors.factors(value)
        self.factors.powers[out] = raised(factors, -1.0) if upside_down else factors
        if (statistic := self.of(value)) is None:
            return
        if upside_down:
            self.known[out] = replace(raised_to(statistic, -1.0), plain=False)
        else:
            self.known[out] = scaled(statistic, number, sign)

    def _combine(self, node: Node, first: Statistic, second: Statistic) -> None:
        """Two statistics of one value, multiplied."""
        if first.source != second.source or first.axes != second.axes:
            return
        alike = replace(first, power=1.0, degree=0.0) == replace(second, power=1.0, degree=0.0)
        made = replace(
            first,
            form=first.form if alike and first.inner == 1.0 else "other",
            power=first.power + second.power,
            degree=first.degree + second.degree,
        )
        if made.degree:
            self.known[node.outputs[0]] = made

    def _add(self, node: Node, sign: float) -> None:
        values, numbers = self.numbers(node, learned=True)
        if not values or node.bound.get("alpha", 1) != 1:
            return
        first = self.of(values[0])
        if len(values) == 1:
            if first is not None and (sign > 0 or _is_first(node, values[0])):
                self.known[node.outputs[0]] = with_eps(first, numbers[0] and sign * numbers[0])
            return
        second = self.of(values[1])
        made = first and second and difference(first, second, sign)
        if made:
            self.known[node.outputs[0]] = made
        else:
            self._center(node, values, sign)

    def _center(self, node: Node, values: list[int], sign: float) -> None:
        """`x − mean(x)`, `x + (−mean(x))`, `mean(x) − x`."""
        for x, mean, factor in ((values[0], values[1], sign), (values[1], values[0], sign)):
            statistic = self.of(mean)
            if statistic is None or not statistic.is_mean or factor * statistic.inner > 0:
                continue
            if statistic.source == self.factors.factors(x):
                self.centers[node.outputs[0]] = Center(statistic.source, x, statistic.axes)
                return

    def _bound(self, node: Node, op: str) -> None:
        """A statistic that is kept away from zero."""
        named = node.bound
        sides = [named[k] for k in ("self", "other", "min") if named.get(k) is not None]
        values = [s.value for s in sides if isinstance(s, Ref)]
        found = [statistic for v in values if (statistic := self.of(v)) is not None]
        others = [v for v in values if self.of(v) is None]
        if len(found) != 1 or named.get("max") is not None:
            return
        if any(self.factors.size(v) > 1 and self.factors.roots_of(v) is None for v in others):
            return
        numbers = [s for s in sides if not isinstance(s, Ref)]
        low = float(numbers[0]) if numbers and isinstance(numbers[0], (int, float)) else None
        exact = op == "relu" or (low == 0 and op != "where")
        bounded = with_eps(replace(found[0], plain=False), low)
        self.known[node.outputs[0]] = found[0] if exact else bounded

    def _logarithm(self, node: Node, op: str) -> None:
        """`exp(−½ log(s))` is a power of s."""
        read = self.factors.same_of(node.inputs[0])
        if op == "log" and (statistic := self.of(read)) is not None:
            self.logarithms[node.outputs[0]] = statistic
        elif op == "exp":
            self._exponential(node, read)

    def _exponential(self, node: Node, read: int) -> None:
        power, made = 1.0, self.graph.producer(read)
        while made is not None and made.op in ("mul", "div", "neg"):
            values, numbers = self.numbers(made)
            number = -1.0 if made.op == "neg" else (numbers or [None])[0]
            if len(values) != 1 or number is None or not _is_first(made, values[0]):
                return
            power = power / number if made.op == "div" else power * number
            read = self.factors.same_of(values[0])
            made = self.graph.producer(read)
        if read in self.logarithms:
            self.known[node.outputs[0]] = raised_to(self.logarithms[read], power)

    def families(self, statistic: Statistic) -> Iterator[tuple[Powers, Form, float]]:
        """(factors of a value, form, degree): of what a statistic is one, and which.

        One of a difference from a mean is one of x as well, one of a part of x of all of it, and
        one of statistics of x.
        """
        degree, factor = statistic.degree, next(iter(statistic.source))
        single = len(statistic.source) == 1 and factor[1] == 1
        center = self.centers.get(factor[0]) if single else None
        exact = statistic.form == "square" and center and center.axes == statistic.axes
        if center is not None and exact:
            yield center.powers, "variance", degree
        yield statistic.source, statistic.form, degree
        if center is not None and not exact:
            yield center.powers, "other", degree
        whole = opened(statistic.source, self.factors.parts)
        if whole is not None and whole != statistic.source:
            yield whole, "other", degree
        if single and (inner := self.known.get(factor[0])) is not None:
            yield inner.source, "other", degree * inner.degree


def _is_first(node: Node, value: int) -> bool:
    return isinstance(node.args[0], Ref) and node.args[0].value == value


_POWERS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0, "square": 2.0}
