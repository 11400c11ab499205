"""The graph of a model's forwards: on the inputs that were given, or on ones made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from flashnorm.errors import TraceError
from flashnorm.graph import inputs
from flashnorm.graph.ir import Graph
from flashnorm.graph.trace import trace
from flashnorm.graph.unite import united


def record(
    model: nn.Module,
    example_inputs: Any = None,
    allow_real: bool = True,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Graph:
    """The graph of a model, on all of the given inputs or on ones made from its signature.

    `prepare` may change the stand-in that is recorded. The model itself is only read.
    """

    def decode(stand_in: nn.Module, given: Any, output: Any) -> Any:
        return inputs.decode_inputs(given, output, stand_in)

    def traced(candidates: Iterable[Any]) -> Graph:
        return trace(model, candidates, decode, allow_real=allow_real, prepare=prepare)

    if example_inputs is None:
        return traced(inputs.example_inputs(model))
    return united([traced([given]) for given in input_sets(example_inputs)])


def input_sets(given: Any) -> list[Any]:
    """A list holds several sets of inputs; a tensor by itself is a forward's one argument."""
    sets = given if isinstance(given, list) else [given]
    if not sets:
        raise TraceError("example_inputs is an empty list: give at least one set of inputs")
    return [one if isinstance(one, (Mapping, tuple)) else (one,) for one in sets]


def operations(graph: Graph) -> list[tuple[str, str, str]]:
    """What a forward does, in order: to tell whether a setting changes it."""
    return [(node.op, node.path, node.source) for node in graph.nodes]
