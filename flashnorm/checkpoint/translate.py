"""What a plan for the parameters of a model means for the tensors of its checkpoint."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flashnorm.checkpoint.mapping import REMEDY
from flashnorm.checkpoint.parts import Part, Whole, compact, runs_along
from flashnorm.errors import CheckpointError
from flashnorm.plan import Centring, Consumer, Gain, Span

Absorptions = tuple[tuple[Gain, Consumer], ...]
# In a vector of labels: the position takes no gain, or lies outside of the part.
_PLAIN, _OUTSIDE = -1, -2


@dataclass(frozen=True)
class _Claim:
    """What one part of a parameter asks of its tensor: gain elements along an axis of it."""

    consumer: Consumer  # of the tensor
    gain: Gain
    parameter: str
    numel: int  # elements that take part
    rest: int  # elements of the tensor at each position of the axis


def tensor_absorptions(
    wanted: Iterable[tuple[str, Whole, Absorptions]],
) -> dict[str, Absorptions]:
    """For every tensor what it absorbs, from (parameter, where it lies, what that absorbs).

    Raises CheckpointError where a gain does not run along one axis of a whole tensor.
    """
    claims: dict[str, list[_Claim]] = defaultdict(list)
    for name, whole, pairs in wanted:
        for gain, consumer in pairs:
            labels = _labels(whole.shape[consumer.axis], consumer.spans)
            for part in whole.parts:
                if claim := _claim(name, part, consumer.axis, labels, gain):
                    claims[part.tensor].append(claim)
    return {tensor: tuple(_settled(tensor, found)) for tensor, found in claims.items()}


def _labels(size: int, spans: Iterable[Span]) -> Tensor:
    """For each position of an axis the gain element that it takes."""
    labels = torch.full((size,), _PLAIN)
    for span in spans:
        elements = torch.arange(span.gain_start, span.gain_start + span.length)
        labels[span.start : span.start + span.length] = elements
    return labels


def _claim(name: str, part: Part, axis: int, labels: Tensor, gain: Gain) -> _Claim | None:
    labels = labels.narrow(0, part.start[axis], part.shape[axis])
    if bool((labels == _PLAIN).all()):
        return None
    for own, coordinate in enumerate(part.coordinates):
        found = _scattered(compact(coordinate), axis, labels, part.sizes[own])
        if found is None:
            continue
        taking = int((found >= 0).sum())
        inside = int((found != _OUTSIDE).sum())
        consumer = Consumer(part.tensor, own, tuple(_spans(found)))
        rest = part.numel // inside
        return _Claim(consumer, gain, name, taking * rest, math.prod(part.sizes) // part.sizes[own])
    raise CheckpointError(
        f"the gain {gain.parameter} runs along no single axis of the tensor {part.tensor}, which "
        f"transformers makes into {name}; {REMEDY}"
    )


def _scattered(coordinate: Tensor, axis: int, labels: Tensor, size: int) -> Tensor | None:
    """The labels along an axis of the tensor; None where one position would have several.

    coordinate: for each element of a box (size 1 where it does not vary) its position on the
    tensor's axis; labels: [n] along `axis` of the box.
    """
    lead = [1] * coordinate.ndim
    lead[axis] = len(labels)
    first, second = torch.broadcast_tensors(coordinate, labels.view(lead))
    found = torch.full((size,), _OUTSIDE)
    found[first.reshape(-1)] = second.reshape(-1)
    return found if bool((found[first] == second).all()) else None


def _spans(labels: Tensor) -> Iterator[Span]:
    """Runs of neighbouring positions with neighbouring gain elements."""
    taking = (labels >= 0).nonzero().flatten()
    elements = labels[taking]
    breaks = ((taking.diff() != 1) | (elements.diff() != 1)).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(taking)]
    for low, high in pairwise(bounds):
        yield Span(int(taking[low]), int(elements[low]), high - low)


def _settled(tensor: str, claims: list[_Claim]) -> Iterator[tuple[Gain, Consumer]]:
    """Claims put together: parts that lie side by side must ask the same of the tensor."""
    together: dict[tuple[Gain, Consumer], list[_Claim]] = defaultdict(list)
    for claim in claims:
        together[claim.gain, claim.consumer].append(claim)
    for (gain, consumer), found in together.items():
        whole = sum(span.length for span in consumer.spans) * found[0].rest
        if sum(claim.numel for claim in found) != whole:
            raise CheckpointError(
                f"only a part of the tensor {tensor} absorbs the gain {gain.parameter}: "
                f"transformers makes {found[0].parameter} and others of it; {REMEDY}"
            )
        yield gain, consumer


def tensor_centrings(wanted: Iterable[tuple[Centring, Whole]]) -> dict[str, int]:
    """For every tensor of a centred weight the axis of the mean.

    Raises CheckpointError where the mean runs over several tensors, or over a part of one.
    """
    axes: dict[str, int] = {}
    left: dict[str, int] = {}
    for centring, whole in wanted:
        for part in whole.parts:
            axes[part.tensor] = _centred_axis(centring, whole, part)
            left[part.tensor] = left.get(part.tensor, math.prod(part.sizes)) - part.numel
    for tensor, count in left.items():
        if count:
            raise CheckpointError(f"only a part of the tensor {tensor} is centred; {REMEDY}")
    return axes


def _centred_axis(centring: Centring, whole: Whole, part: Part) -> int:
    if part.shape[centring.axis] == whole.shape[centring.axis]:
        for own, coordinate in enumerate(part.index):
            if part.sizes[own] == part.shape[centring.axis] and runs_along(
                coordinate, centring.axis
            ):
                return own
    raise CheckpointError(
        f"{centring.parameter} is centred over features that the checkpoint does not hold along "
        f"one axis of {part.tensor}; {REMEDY}"
    )
