"""`ProvenanceTensor`s move places exactly as torch moves values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashnorm.checkpoint.provenance import NotAMove, ProvenanceTensor
from flashnorm.checkpoint.translate import tensor_absorptions, tensor_centerings
from flashnorm.errors import CheckpointError
from flashnorm.plan import Centering, Consumer, Gain, Span

GAIN = Gain("g")


def pair(name, shape, first):
    """A tensor of distinct numbers, and its twin with its provenance."""
    count = torch.Size(shape).numel()
    return torch.arange(first, first + count).view(shape), ProvenanceTensor.of(name, shape)


def rebuilt(located, tensors):
    """The values that a tensor's provenance points at."""
    value = torch.full(located.shape, -1)
    for part in located.slices:
        value[part.place] = tensors[part.tensor][part.box.index]
    return value


@st.composite
def moves(draw):
    """Some tensors of one shape, joined or stacked, amid random moves of one tensor."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = draw(st.integers(1, 3))
    pairs = [pair(f"t{i}", shape, 100 * i) for i in range(count)]
    tensors = {f"t{i}": value for i, (value, _) in enumerate(pairs)}
    values, located = [v for v, _ in pairs], [t for _, t in pairs]
    for _ in range(draw(st.integers(0, 3))):
        change = draw(change_of(values[0].shape, reshaping=True))
        values, located = [change(v) for v in values], [change(t) for t in located]
    join, axis = draw(st.sampled_from([torch.stack, torch.cat])), draw(st.integers(0, 2))
    axis %= values[0].ndim + (join is torch.stack)
    value, place = join(values, axis), join(located, axis)
    for _ in range(draw(st.integers(0, 3))):
        change = draw(change_of(value.shape, reshaping=False))
        value, place = change(value), change(place)
    return value, place, tensors


@st.composite
def change_of(draw, shape, reshaping):
    axis = draw(st.integers(0, len(shape) - 1))
    size = shape[axis]
    order = draw(st.permutations(range(len(shape))))
    low = draw(st.integers(0, size - 1))
    high = draw(st.integers(low + 1, size))
    choices = [
        lambda t: t.permute(order),
        lambda t: t.transpose(axis, -1),
        lambda t: t.unsqueeze(axis),
        lambda t: t.narrow(axis, low, high - low),
        lambda t: t.chunk(2, axis)[-1],
        lambda t: torch.split(t, [low, size - low], axis)[1],
        lambda t: t.contiguous().clone().to(torch.float64),
    ]
    if len(shape) > 1:
        choices += [lambda t: t.select(axis, low), lambda t: t.unbind(axis)[low]]
        choices += [lambda t: t.squeeze(axis)] if size > 1 else []
    if reshaping:
        halves = (2, size // 2) if size % 2 == 0 else (1, size)
        flipped = [*shape[:axis], *halves, *shape[axis + 1 :]]
        choices += [
            lambda t: t.reshape(-1),
            lambda t: t.reshape(flipped).transpose(axis, axis + 1).reshape(shape),
        ]
    return draw(st.sampled_from(choices))


@settings(max_examples=300, deadline=None)
@given(moves())
def test_places_move_as_values(moved):
    value, place, tensors = moved
    assert torch.equal(rebuilt(place, tensors), value.long())


@settings(max_examples=300, deadline=None)
@given(moves(), st.data())
def test_gains_reach_the_same_elements(moved, data):
    """A gain along an axis of the value marks in each tensor what it marks in the value."""
    value, place, tensors = moved
    axis = data.draw(st.integers(0, value.ndim - 1))
    start = data.draw(st.integers(0, value.shape[axis] - 1))
    length = data.draw(st.integers(1, value.shape[axis] - start))
    consumer = Consumer("p", axis, (Span(start, 7, length),))
    try:
        found = tensor_absorptions([("p", place.provenance(), ((GAIN, consumer),))])
    except CheckpointError:
        return  # not along one axis, or of a part
    gains = torch.zeros(value.shape[axis], dtype=torch.long)
    gains[start : start + length] = torch.arange(7, 7 + length)
    wanted = gains.view([-1 if i == axis else 1 for i in range(value.ndim)]).expand(value.shape)
    marks = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for name, pairs in found.items():
        for _, c in pairs:
            for span in c.spans:
                part = marks[name].narrow(c.axis, span.start, span.length)
                lead = [-1 if i == c.axis else 1 for i in range(part.ndim)]
                part += torch.arange(span.gain_start, span.gain_start + span.length).view(lead)
    assert torch.equal(rebuilt(place, marks), wanted)
    assert sum(int((m != 0).sum()) for m in marks.values()) == int((wanted != 0).sum())


def absorbed(located, axis, length, start=0):
    consumer = Consumer("p", axis, (Span(start, 0, length),))
    return tensor_absorptions([("p", located.provenance(), ((GAIN, consumer),))])


def test_a_transposed_tensor_absorbs_along_its_other_axis():
    found = absorbed(ProvenanceTensor.of("t", (6, 4)).t(), 0, 4)
    assert found == {"t": ((GAIN, Consumer("t", 1, (Span(0, 0, 4),))),)}


def test_interleaved_columns_absorb_in_spans():
    """[a b a b] of the tensor is [a a b b] of the model."""
    located = ProvenanceTensor.of("t", (3, 4)).reshape(3, 2, 2).transpose(1, 2).reshape(3, 4)
    (found,) = absorbed(located, 1, 4)["t"]
    assert [(s.start, s.gain_start) for s in found[1].spans] == [(0, 0), (1, 2), (2, 1), (3, 3)]


def test_split_tensors_are_put_together_again():
    """Two parameters that are halves of one tensor and absorb the same make one reader of it."""
    halves = ProvenanceTensor.of("t", (6, 4)).chunk(2)
    consumer = Consumer("p", 1, (Span(0, 0, 4),))
    wanted = [(f"p{i}", half.provenance(), ((GAIN, consumer),)) for i, half in enumerate(halves)]
    assert tensor_absorptions(wanted) == {"t": ((GAIN, Consumer("t", 1, (Span(0, 0, 4),))),)}
    with pytest.raises(CheckpointError, match="only a part of the tensor t absorbs the gain g"):
        tensor_absorptions(wanted[:1])


def test_a_gain_across_two_axes_is_refused():
    with pytest.raises(CheckpointError, match="gain g runs along no single axis of the tensor t"):
        absorbed(ProvenanceTensor.of("t", (2, 3)).reshape(6), 0, 6)


def test_a_mean_over_a_permuted_axis_is_refused():
    """Its sum would run in another order than in memory, so its last bit might differ."""
    located = ProvenanceTensor.of("t", (3, 4)).reshape(3, 2, 2).transpose(1, 2).reshape(3, 4)
    assert tensor_centerings([(Centering("p", 0), located.provenance())]) == {"t": 0}
    with pytest.raises(CheckpointError, match="p is centered over features that the checkpoint"):
        tensor_centerings([(Centering("p", 1), located.provenance())])


def test_a_mean_over_a_part_of_a_tensor_is_refused():
    half = ProvenanceTensor.of("t", (6, 4)).chunk(2)[0]
    with pytest.raises(CheckpointError, match="only a part of the tensor t is centered"):
        tensor_centerings([(Centering("p", 1), half.provenance())])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * 2,
        lambda t: t + t,
        lambda t: t[::2],
        lambda t: t.flip(0),
        lambda t: torch.cat([t, torch.zeros(1, 4)]),
        lambda t: torch.stack([t, t]).reshape(-1),
        lambda t: t.sum(0),
    ],
)
def test_new_values_are_refused(change):
    with pytest.raises(NotAMove, match=r"no pure move|not followed|joined|reshaped together"):
        change(ProvenanceTensor.of("t", (4, 4)))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.cat([t, t.narrow(1, 0, 2)]),
        lambda t: torch.stack([t, t.t()]),
        lambda t: t.view(5, 5),
        lambda t: torch.split(t, [1, 2]),
    ],
)
def test_what_torch_refuses_is_refused(change):
    with pytest.raises(RuntimeError):
        change(ProvenanceTensor.of("t", (4, 3)))
