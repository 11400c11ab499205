"""What a plan for the parameters of a model means for the tensors of its checkpoint."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from flashnorm.checkpoint.boxes import Box, runs_along
from flashnorm.checkpoint.mapping import REMEDY
from flashnorm.checkpoint.provenance import Provenance, TensorSlice
from flashnorm.errors import CheckpointError
from flashnorm.plan import Centering, Consumer, Gain, Span

Absorptions = tuple[tuple[Gain, Consumer], ...]
# In a vector of gain indices: the position takes no gain, or lies outside of the part.
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
    wanted: Iterable[tuple[str, Provenance, Absorptions]],
) -> dict[str, Absorptions]:
    """For every tensor what it absorbs, from (parameter, where it lies, what that absorbs).

    Raises CheckpointError where a gain does not run along one axis of a whole tensor.
    """
    claims: dict[str, list[_Claim]] = defaultdict(list)
    for name, provenance, pairs in wanted:
        for gain, consumer in pairs:
            for part in provenance.slices:
                if claim := _claim(name, part, gain, consumer):
                    claims[part.tensor].append(claim)
    return {tensor: tuple(_settled(tensor, found)) for tensor, found in claims.items()}


def _claim(name: str, part: TensorSlice, gain: Gain, consumer: Consumer) -> _Claim | None:
    axis, sizes = consumer.axis, part.box.sizes
    found = _along(part.box, axis, consumer.spans, part.start[axis])
    if found is None:
        raise CheckpointError(
            f"the gain {gain.parameter} runs along no single axis of the tensor {part.tensor}, "
            f"which transformers makes into {name}; {REMEDY}"
        )
    own, spans, numel = found
    if not spans:
        return None
    rest = math.prod(sizes) // sizes[own]
    return _Claim(Consumer(part.tensor, own, spans), gain, name, numel, rest)


@lru_cache(maxsize=4096)
def _along(
    box: Box, axis: int, spans: tuple[Span, ...], start: int
) -> tuple[int, tuple[Span, ...], int] | None:
    """Spans of a value's axis as spans of an axis of the tensor behind a box that lies at `start`.

    Returns that axis, the spans, and how many elements of the box they take in; no spans where
    the box has no part in them, None where they run along no single axis of the tensor.
    """
    gain_indices = _gain_indices(start + box.shape[axis], spans)[start:]
    if bool((gain_indices == _PLAIN).all()):
        return 0, (), 0
    for own, coordinate in enumerate(box.index):
        found = _scattered(coordinate, axis, gain_indices, box.sizes[own])
        if found is not None:
            taking, inside = int((found >= 0).sum()), int((found != _OUTSIDE).sum())
            return own, tuple(_spans(found)), taking * (box.numel // inside)
    return None


def _gain_indices(size: int, spans: Iterable[Span]) -> Tensor:
    """For each of the first `size` positions of an axis the gain element that it takes."""
    gain_indices = torch.full((size,), _PLAIN)
    for span in spans:
        length = min(span.length, size - span.start)
        if length > 0:
            elements = torch.arange(span.gain_start, span.gain_start + length)
            gain_indices[span.start : span.start + length] = elements
    return gain_indices


def _scattered(coordinate: Tensor, axis: int, gain_indices: Tensor, size: int) -> Tensor | None:
    """The gain indices along an axis of the tensor; None where one position would have several.

    coordinate: for each element of a box (size 1 where it does not vary) its position on the
    tensor's axis; gain_indices: [n] along `axis` of the box.
    """
    if coordinate.shape[axis] == 1:
        if bool((gain_indices != gain_indices[0]).any()):
            return None
        gain_indices = gain_indices[:1]
    lead = [1] * coordinate.ndim
    lead[axis] = len(gain_indices)
    first, second = torch.broadcast_tensors(coordinate, gain_indices.view(lead))
    found = torch.full((size,), _OUTSIDE)
    found[first.reshape(-1)] = second.reshape(-1)
    return found if bool((found[first] == second).all()) else None


def _spans(gain_indices: Tensor) -> Iterator[Span]:
    """Runs of neighbouring positions with neighbouring gain elements."""
    taking = (gain_indices >= 0).nonzero().flatten()
    elements = gain_indices[taking]
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
        total = sum(span.length for span in consumer.spans) * found[0].rest
        if sum(claim.numel for claim in found) != total:
            raise CheckpointError(
                f"only a part of the tensor {tensor} absorbs the gain {gain.parameter}: "
                f"transformers makes {found[0].parameter} and others of it; {REMEDY}"
            )
        yield gain, consumer


def tensor_centerings(wanted: Iterable[tuple[Centering, Provenance]]) -> dict[str, int]:
    """For every tensor of a centered weight the axis of the mean.

    Raises CheckpointError where the mean runs over several tensors, or over a part of one.
    """
    axes: dict[str, int] = {}
    left: dict[str, int] = {}
    for centering, provenance in wanted:
        for part in provenance.slices:
            axes[part.tensor] = _centered_axis(centering, provenance, part)
            left[part.tensor] = left.get(part.tensor, math.prod(part.box.sizes)) - part.box.numel
    for tensor, count in left.items():
        if count:
            raise CheckpointError(f"only a part of the tensor {tensor} is centered; {REMEDY}")
    return axes


def _centered_axis(centering: Centering, provenance: Provenance, part: TensorSlice) -> int:
    size = provenance.shape[centering.axis]
    if part.box.shape[centering.axis] == size:
        for own, coordinate in enumerate(part.box.index):
            if part.box.sizes[own] == size and runs_along(coordinate, centering.axis):
                return own
    raise CheckpointError(
        f"{centering.parameter} is centered over features that the checkpoint does not hold along "
        f"one axis of {part.tensor}; {REMEDY}"
    )
