"""The records of following gains: what is known of every value, and how parameters are used."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashnorm.graph.gain_index import FREE, NONE, filled, without_repeats
from flashnorm.graph.ir import Graph, Node
from flashnorm.graph.params import SAME, ParamView
from flashnorm.graph.sites import NormCall


@dataclass(frozen=True)
class Use:
    """One operation that reads a parameter.

    A contraction with an indexed value has `axis` and, per position of that axis it touches, the
    gain index; a contraction with an unindexed value has neither; anything else is `other`. `slot`
    is the bias that the contraction adds, where it can take what the norm's bias adds (E2).
    """

    node: Node
    other: bool = False
    axis: int | None = None
    positions: Tensor | None = None
    indices: Tensor | None = None
    slot: str = ""


@dataclass(frozen=True)
class NormBiasUse:
    """One addition of a norm's bias to values that carry its gain, element by element."""

    parameter: str
    node: Node


@dataclass(frozen=True)
class GainUse:
    """One multiplication of a norm's output by a gain: by which parameter, and through what."""

    norm_call: NormCall
    parameter: str
    value: int


@dataclass(frozen=True)
class EarlyGain:
    """A gain `value` that is part of a norm's product before the product is whole."""

    norm_call: NormCall
    value: int


@dataclass
class Flow:
    """What is known after following every gain through a graph."""

    graph: Graph
    norm_calls: dict[int, NormCall] = field(default_factory=dict)
    gains: list[GainUse] = field(default_factory=list)
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    # What was seen of every parameter where something was computed with it.
    reads: dict[str, list[ParamView]] = field(default_factory=lambda: defaultdict(list))
    refused: dict[str, str] = field(default_factory=dict)
    # The biases that norms add after each gain, the values that are such a sum, only moved, and
    # those that are made of one in whatever way.
    norm_biases: dict[str, list[NormBiasUse]] = field(default_factory=lambda: defaultdict(list))
    sums: set[int] = field(default_factory=set)
    biased: set[int] = field(default_factory=set)
    touched: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    # The gain index of each gain's first element, in increasing order.
    bases: dict[str, int] = field(default_factory=dict)
    indices: dict[int, Tensor] = field(default_factory=dict)
    views: dict[int, ParamView] = field(default_factory=dict)
    pending: dict[int, list[NormCall]] = field(default_factory=dict)
    # The gains that are multiplied with a part of a norm, by node; the nodes from there to its
    # output; and why what a norm is multiplied by is no gain that can be moved.
    early: dict[int, list[EarlyGain]] = field(default_factory=lambda: defaultdict(list))
    passing: dict[int, list[NormCall]] = field(default_factory=lambda: defaultdict(list))
    odd: dict[int, str] = field(default_factory=dict)
    zeros: set[int] = field(default_factory=set)
    roots: list[frozenset[str] | None] = field(default_factory=list)

    def refuse(self, gain_index: Tensor, reason: str) -> None:
        """Refuse every gain that the gain index names; the first reason stays."""
        for name in self.gains_in(gain_index):
            self.refused.setdefault(name, reason)

    def add_norm_bias(self, gain_index: Tensor, bias: int, node: Node, again: bool = False) -> None:
        """Note a norm's bias that is added to values with this gain index; refuse what is not one,
        and one that is added to a sum with another (`again`)."""
        gains = self.gains_in(gain_index)
        view = self.views.get(bias)
        elements = view.elements() if view is not None and view.relation == SAME else None
        for gain in gains:
            names = ", ".join(sorted(self.roots[bias] or ())) or "a tensor that is no parameter"
            if (
                view is None
                or elements is None
                or not _is_aligned(gain_index, self.base(gain), elements)
            ):
                reason = f"{names} is added to it otherwise than feature by feature ({node.where})"
                self.refused.setdefault(gain, reason)
                continue
            if again:
                reason = f"several biases are added to it, one after the other ({node.where})"
                self.refused.setdefault(gain, reason)
                continue
            self.norm_biases[gain].append(NormBiasUse(view.name, node))
            self.sums.update(node.outputs[:1])
            self.biased.update(node.outputs[:1])

    def uses_of(self, norm_call: NormCall) -> list[GainUse]:
        return [use for use in self.gains if use.norm_call is norm_call]

    def gains_in(self, gain_index: Tensor) -> list[str]:
        """The gain parameters that a gain index names."""
        numbers = without_repeats(gain_index).numpy()
        numbers = numbers[numbers > NONE]
        if not len(numbers):
            return []
        starts = list(self.bases.values())
        first = bisect_right(starts, numbers.min()) - 1
        last = bisect_right(starts, numbers.max()) - 1
        between = range(first, last + 1)
        return [n for i, n in enumerate(self.bases) if i in between and self._names(n, numbers)]

    def _names(self, gain: str, numbers: Any) -> bool:
        base = self.bases[gain]
        return bool(((numbers >= base) & (numbers < base + self.numel(gain))).any())

    def index_of(self, value: int) -> Tensor:
        """The gain index of any value: zeros carry whatever is asked for, the unindexed nothing."""
        if value in self.indices:
            return self.indices[value]
        return filled(self.graph.values[value].shape, FREE if value in self.zeros else NONE)

    def parameters_in(self, value: int) -> frozenset[str] | None:
        """The parameters that a value is computed from; None if it depends on an input."""
        return self.roots[value]

    def numel(self, name: str) -> int:
        return int(torch.Size(self.graph.values[self.graph.parameters[name]].shape).numel())

    def base(self, name: str) -> int:
        """The gain index of the first element of a gain parameter."""
        if name not in self.bases:
            last = next(reversed(self.bases), None)
            self.bases[name] = 1 if last is None else self.bases[last] + self.numel(last)
        return self.bases[name]


def _is_aligned(gain_index: Tensor, base: int, elements: Tensor) -> bool:
    """Whether each element of the bias meets the gain element of the same number."""
    meets, mine = without_repeats(gain_index), without_repeats(elements) + base
    try:
        return bool((torch.broadcast_to(mine, meets.shape) == meets).all())
    except RuntimeError:
        return False
