"""What the recorded passes did not read, and the edits that this leaves in doubt.

A cold expert or an unused head may read a norm's output all the same; the norm of another modality,
or another row of a bank of gains, may stand before the same linear layer, another writer before
the same LayerNorm. Whatever could do so for another input is a doubt, and a doubt refuses. Inputs
that reach it settle it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from flashnorm.graph.flow import Flow
from flashnorm.graph.ir import Graph, Node
from flashnorm.graph.reads import is_whole, row_of_bank
from flashnorm.graph.ties import can_be_untied, names_of

UNREAD = "{} was not reached by the recorded passes and may {}; inputs that reach it settle it"
IN_PART = "{} was read in part by the recorded passes; inputs that reach the rest settle it"
ELSEWHERE = (
    "{} {} is also {}, in a part of the model that the recorded passes did not reach; "
    "inputs that reach it settle it"
)


@dataclass(frozen=True)
class Unreached:
    """What nothing was computed with, and the modules where anything was.

    `unread` maps parameters, and those of which some rows alone were read, to the shape of what is
    left, or of one row of it.
    """

    graph: Graph
    parameters: tuple[str, ...]
    unread: dict[str, tuple[int, ...]]
    buffers: dict[str, int]
    active: set[str]

    @classmethod
    def of(cls, flow: Flow) -> Unreached:
        graph = flow.graph
        ran = [node for node in graph.nodes if _computes(flow, node)]
        read = {value for node in ran for value in node.inputs}
        called = [
            call.path
            for call in graph.calls.values()
            if not any(0 in graph.values[v].shape for v in (*call.received, *call.returned))
        ]
        unread = {
            n: graph.values[v].shape for n, v in graph.parameters.items() if not flow.reads.get(n)
        }
        rows = {name: row_of_bank(views) for name, views in flow.reads.items()}
        return cls(
            graph,
            tuple(unread),
            unread | {name: row for name, row in rows.items() if row},
            {name: value for name, value in graph.buffers.items() if value not in read},
            _with_ancestors({node.path for node in ran} | set(called)),
        )

    def doubt(self, width: int, paths: set[str], read: str, replace: str) -> str:
        """Why values of this width, which pass by these modules, may be read or made otherwise.

        `read` and `replace` say what a matrix, and what a vector, may do with them. Empty where
        nothing that was not reached could.
        """
        for name, what in self._suspects(width, read, replace):
            if _is_visible(paths, self._owner(name)):
                part = name in self.graph.parameters and name not in self.parameters
                return IN_PART.format(name) if part else UNREAD.format(name, what)
        return ""

    def elsewhere(self, what: str, name: str, untie: bool) -> str:
        """Why a parameter may be used in another way, by another of its names.

        With `untie` a weight that modules of their own share is given to each of them.
        """
        names = names_of(self.graph, name)
        for alias in names if len(names) > 1 else ():
            own = alias.rpartition(".")[0]
            holder = self._holder(own)
            if holder not in self.active and not (untie and holder == own):
                return ELSEWHERE.format(what, names[-1] if alias == name else name, alias)
        return ""

    def module_elsewhere(self, path: str) -> str:
        """Why a module may be used in another way, at another of its paths."""
        for alias, first in self.graph.modules.items():
            if first == path != alias and self._holder(alias) not in self.active:
                return ELSEWHERE.format("the module", path, alias)
        return ""

    def _suspects(self, width: int, read: str, replace: str) -> Iterator[tuple[str, str]]:
        """What could do either by its shape."""
        for name, shape in self.unread.items():
            if len(shape) >= 2:
                yield name, read
            elif _fits(prod(shape), width):
                yield name, replace
        for name, value in self.buffers.items():
            held = self.graph.values[value]
            if held.dtype.is_floating_point and prod(held.shape) == width > 1:
                yield name, replace

    def _owner(self, name: str) -> str:
        """The nearest module around a parameter in which anything ran."""
        path = name.rpartition(".")[0]
        while path not in self.active:
            path = path.rpartition(".")[0]
        return path

    def _holder(self, path: str) -> str:
        """The innermost module around a path that is registered there first and so is itself."""
        while self.graph.modules.get(path, path) != path:
            path = path.rpartition(".")[0]
        return path


def _computes(flow: Flow, node: Node) -> bool:
    """Whether anything was computed of values: a weight that is transposed for nothing is none."""
    values = (v for v in node.inputs if v not in flow.views and 0 not in flow.graph.values[v].shape)
    return not flow.graph.is_idle(node) and any(True for _ in values)


def refuse_unreached(flow: Flow, unreached: Unreached) -> None:
    """Refuse the gains in doubt."""
    for gain, paths in flow.touched.items():
        if doubt := unreached.doubt(flow.numel(gain), paths, "read it", "take its place"):
            flow.refused.setdefault(gain, doubt)
    _refuse_parts(flow)
    for gain in dict.fromkeys(use.parameter for use in flow.gains):
        held = [("the gain", gain)]
        held += [("its bias", norm_bias.parameter) for norm_bias in flow.norm_biases.get(gain, ())]
        for what, name in held:
            if doubt := unreached.elsewhere(what, name, untie=False):
                flow.refused.setdefault(gain, doubt)


def refuse_unreached_readers(flow: Flow, unreached: Unreached, untie: bool) -> None:
    """Refuse the gains of readers that are also a part of a module that did not run, where no
    reading that was recorded does: what is known of a tie says more than a doubt."""
    for name, uses in flow.uses.items():
        absorbing = [use.indices for use in uses if use.indices is not None]
        parts = untie and can_be_untied(flow, name)
        if absorbing and (doubt := unreached.elsewhere("its reader", name, parts)):
            for indices in absorbing:
                flow.refuse(indices, doubt)


def _refuse_parts(flow: Flow) -> None:
    """Gains, biases of norms and readers that other inputs may use other parts of."""
    for name in dict.fromkeys(use.parameter for use in flow.gains):
        if not is_whole(flow.reads[name]):
            flow.refused.setdefault(name, IN_PART.format(f"the gain {name}"))
    for gain, norm_biases in flow.norm_biases.items():
        for name in dict.fromkeys(norm_bias.parameter for norm_bias in norm_biases):
            if not is_whole(flow.reads[name]):
                flow.refused.setdefault(gain, IN_PART.format(f"its bias {name}"))
    for name, uses in flow.uses.items():
        absorbing = [use.indices for use in uses if use.indices is not None]
        if absorbing and not is_whole(flow.reads[name]):
            for indices in absorbing:
                flow.refuse(indices, IN_PART.format(f"its reader {name}"))


def _fits(size: int, width: int) -> bool:
    """Whether a vector can multiply values that a gain of this width multiplies."""
    return size > 1 and (width % size == 0 or size % width == 0)


def _with_ancestors(paths: set[str]) -> set[str]:
    found = {""}
    for path in paths:
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _is_visible(touched: set[str], owner: str) -> bool:
    """Whether indexed values enter a module from outside, or pass between its parts."""
    prefix = f"{owner}." if owner else ""
    inside = {path for path in touched if path == owner or path.startswith(prefix)}
    if not inside:
        return False
    parts = {path[len(prefix) :].split(".")[0] for path in inside}
    return owner in inside or len(parts) > 1 or inside != touched
