"""What a program does to rows is found where it moves them, and doubted where it does more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from flashnorm.gguf.rearranged import rearrangement
from flashnorm.gguf.routes import Array

SHAPES = {"a": (6, 8), "b": (4, 8)}
STACKS = {"a": (2, 3, 8), "b": (2, 3, 8)}


def program(change: Callable[..., Array | list[Array]]) -> Callable[..., dict[str, torch.Tensor]]:
    def run(arrays):
        made = change(*arrays.values())
        made = made if isinstance(made, list) else [made]
        return {f"p{i}": torch.from_numpy(np.copy(values)) for i, values in enumerate(made)}

    return run


ORDER = np.array([3, 0, 5, 1, 1, 4])
MOVES = [
    (lambda a: a, {"a": (6, 8)}),
    (lambda a: a[ORDER], {"a": (6, 8)}),
    (lambda a: a[::-2], {"a": (6, 8)}),
    (lambda a: a.reshape(2, 3, 8).swapaxes(0, 1), {"a": (6, 8)}),
    (lambda a: [a[:2], a[2:]], {"a": (6, 8)}),
    (lambda a, b: np.concatenate([b, a]), SHAPES),
    (lambda a, b: [b, a[ORDER]], SHAPES),
    (lambda a, b: np.concatenate([a, b], axis=1), STACKS),
    (lambda a, b: np.stack([a[1], b[0]]), STACKS),
]


@pytest.mark.parametrize(("change", "shapes"), MOVES)
def test_rows_are_found(change, shapes):
    run = program(change)
    found = rearrangement(run, shapes)
    rng = np.random.default_rng(1)
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    every = torch.cat([torch.from_numpy(values).view(-1, 8) for values in given.values()])
    for name, result in run(given).items():
        row = found[name]
        assert not row.turned
        assert row.shape == tuple(result.shape)
        assert torch.equal(every[row.source].view(row.shape), result)


def test_a_transpose_is_found():
    found = rearrangement(program(lambda a: a[ORDER].T), {"a": (6, 8)})["p0"]
    assert found.turned
    assert found.shape == (8, 6)
    assert found.source.tolist() == ORDER.tolist()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_what_is_not_touched_takes_no_run_on_whole_matrices():
    seen = []

    def run(arrays):
        (values,) = arrays.values()
        seen.append(values.strides)
        return {"p": torch.from_numpy(values)}

    found = rearrangement(run, {"a": (6, 8)})["p"]
    assert found == ((6, 8), None, False)
    assert len(seen) == 1


def nothing_below_half(a: Array) -> Array:
    return np.where(np.abs(a) < 0.5, np.float32(0), a)


def rounded(a: Array) -> Array:
    return np.round(a)


DOUBTS = [
    lambda a: a * np.float32(2),
    lambda a: a - 1,
    lambda a: np.log(-a),
    lambda a: a[:, ::-1],
    lambda a: np.roll(a, 1, axis=1),
    lambda a: a[:, :4],
    lambda a: a.reshape(12, 4),
    lambda a: np.repeat(a, 2, axis=1),
    lambda a: np.where(np.arange(8) < 4, a, a[::-1]),
    lambda a: a.T.reshape(6, 8),
    lambda a: a.T[::-1],
    lambda a: a.astype(np.float64),
    lambda a: a.astype(np.float16).astype(np.float32),
    lambda a: np.zeros_like(a),
    lambda a: -a,
    lambda a: np.abs(a),
    nothing_below_half,
    rounded,
    lambda a: [a, a + 1],
    lambda a: a.sum(1),
    lambda a: np.sort(a, axis=0),
    lambda a: np.maximum(a, 0),
]


@pytest.mark.filterwarnings("ignore:.*encountered in log:RuntimeWarning")
@pytest.mark.parametrize("change", DOUBTS)
def test_anything_else_is_doubted(change):
    assert rearrangement(program(change), {"a": (6, 8)}) is None


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("change", [lambda v: v.T, lambda v: v[:, None], lambda v: v[1:]])
def test_another_view_is_not_taken_for_the_same(change):
    """Without a copy in between; square, so that the shape does not tell a transpose."""
    found = rearrangement(lambda a: {"p": torch.from_numpy(change(a["a"]))}, {"a": (8, 8)})
    assert found is None or found["p"].source is not None


def test_programs_that_make_nothing_or_different_things():
    assert rearrangement(lambda arrays: {}, {"a": (6, 8)}) is None
    assert rearrangement(program(lambda a: a), {"a": (6, 8), "b": (6, 4)}) is None
    assert rearrangement(program(lambda a: a), {"a": (0, 8)}) is None
    calls = []

    def fickle(arrays):
        calls.append(None)
        return program(lambda a: a[:: -1 if len(calls) > 2 else 1])(arrays)

    assert rearrangement(fickle, {"a": (6, 8)}) is None


def test_what_is_given_cannot_be_written_to():
    def writes(arrays):
        (values,) = arrays.values()
        values += 1
        return {"p": torch.from_numpy(values)}

    with pytest.raises(ValueError, match="read-only"):
        rearrangement(writes, {"a": (6, 8)})
