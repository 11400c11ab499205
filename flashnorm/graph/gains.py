"""The effective gain: what the model really multiplies by, as a function of its parameter.

The parameter-only part of the graph is run on three probes (zeros, ones, random numbers) in
float64. An affine gain `offset + scale · p` is read off these; any other function is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm.graph.failures import UnknownSpelling, bug
from flashnorm.graph.flow import Flow, GainUse
from flashnorm.graph.replay import run
from flashnorm.plan import Gain


class NotAffine(Exception):
    """The gain is not `offset + scale · p`; the text says what it is."""


def convention(flow: Flow, use: GainUse) -> Gain:
    """The gain of one norm as an affine function of its parameter. Raises NotAffine."""
    shape = flow.graph.values[flow.graph.parameters[use.parameter]].shape
    elements = flow.views[use.value].elements()
    if elements is None:
        raise NotAffine("the elements of the gain cannot be told apart")
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(shape, generator=generator, dtype=torch.float64)
    try:
        zero, one, random = (
            _evaluate(flow, use, p).flatten()
            for p in (torch.zeros_like(probe), torch.ones_like(probe), probe)
        )
    except UnknownSpelling as error:
        raise NotAffine(f"the gain cannot be evaluated by itself: {error}") from error
    except Exception as error:
        raise NotAffine(f"the gain cannot be evaluated by itself: {bug(error)}") from error
    offset, scale = float(zero[0]), float(one[0] - zero[0])
    expected = offset + scale * probe.flatten()[elements.flatten()]
    uniform = bool((zero == zero[0]).all()) and bool((one == one[0]).all())
    if scale == 0 or not uniform or not torch.allclose(random, expected, rtol=1e-12, atol=1e-12):
        raise NotAffine(f"the gain is not an affine function of {use.parameter}")
    return Gain(use.parameter, offset, scale)


def _evaluate(flow: Flow, use: GainUse, probe: Tensor) -> Tensor:
    known: dict[int, Tensor] = {flow.graph.parameters[use.parameter]: probe}

    def value(number: int) -> Tensor:
        if number not in known:
            node = flow.graph.producer(number)
            if node is None:
                raise UnknownSpelling("it depends on a value of unknown content")
            known[number] = run(node, value)[node.outputs.index(number)]
        return known[number]

    return value(use.value)
